"""A trunk at constant learning rate, what branches off from its checkpoints, and the rule that ends it."""

import json
import math
import random
import shutil
from pathlib import Path

import pytest
import torch
from commands import ROOT, error_of, finish, start_training
from safetensors.torch import load_file

from qat.runtime.errors import UserError
from qat.train import plateau
from qat.train.config import TrainConfig
from qat.train.run import check_schedule

CONSTANT = "--min_lr_ratio=1"


def flags(model: Path, data: Path, output: Path, steps: int, *more: str) -> list[str]:
    """A run that keeps each of its checkpoints."""
    places = [f"--model={model}", f"--data={data}", f"--output={output}"]
    json_file = f"--deepspeed={ROOT / 'ds_configs' / 'zero3_cpu.json'}"
    settings = [f"--steps={steps}", "--lr=1e-3", "--warmup_steps=2", "--batch_size=2", "--w_bits=3", "--keep=99"]
    return [*places, json_file, *settings, *more]


def log_of(run: Path) -> list[tuple[float, float, float, float]]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["lr"], line["grad_norm"]) for line in lines]


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "final" / "model.safetensors")


def assert_same_weights(one: Path, other: Path) -> None:
    theirs = weights_of(other)
    assert all(torch.equal(weight, theirs[name]) for name, weight in weights_of(one).items())


@pytest.fixture(scope="module")
def trunk(tiny_directory, tiny_data, tmp_path_factory) -> Path:
    """8 steps at constant learning rate, saved after 4 too."""
    run = tmp_path_factory.mktemp("trunk") / "run"
    finish(start_training(1, *flags(tiny_directory, tiny_data, run, 8, CONSTANT, "--save_every=4")))
    return run


def test_a_trunk_in_two_runs_is_one_run(trunk, tiny_directory, tiny_data, tmp_path):
    """Weights, Adam's moments, the learning rate and the order of the data go on where the first run stood."""
    begin = f"--continue_from={trunk / 'checkpoints' / 'step-000004'}"
    finish(start_training(1, *flags(tiny_directory, tiny_data, tmp_path, 8, CONSTANT, begin)))
    assert log_of(tmp_path) == log_of(trunk)[4:]
    assert_same_weights(tmp_path, trunk)


def test_a_branch_decays_from_the_trunk_and_resumes(trunk, tiny_directory, tiny_data, tmp_path, monkeypatch):
    """Without the trunk, too, once it has a checkpoint of its own."""
    shutil.copytree(trunk, tmp_path / "trunk")
    begin = f"--continue_from={tmp_path / 'trunk' / 'checkpoints' / 'step-000008'}"
    command = flags(tiny_directory, tiny_data, tmp_path, 12, "--decay_steps=4", begin, "--save_every=2")
    finish(start_training(1, *command))
    whole = log_of(tmp_path)
    assert [lr for _, _, lr, _ in whole] == pytest.approx(
        [1e-3 * (1 + math.cos(math.pi * n / 4)) / 2 for n in range(4)]
    )
    shutil.move(tmp_path / "final", tmp_path / "uninterrupted" / "final")
    shutil.rmtree(tmp_path / "checkpoints" / "step-000012")
    shutil.rmtree(tmp_path / "trunk")
    finish(start_training(1, *command))
    assert log_of(tmp_path) == whole
    assert_same_weights(tmp_path, tmp_path / "uninterrupted")
    assert "the run is complete" in finish(start_training(1, *command))
    assert "continues was " in error_of(monkeypatch, "train", *command[:-2], "--save_every=2")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ("--lr=2e-3", "of a run with other settings (lr was 0.001, now 0.002)"),
        ("--steps=8", "has taken 8 steps already: give more --steps"),
        ("--continue_from=nowhere", "nowhere is not a checkpoint"),
        ("--min_lr_ratio=0", "would jump from 1 to 0.345 of lr: give --decay_steps 4 or fewer"),
        ("--decay_steps=11", "decay_steps=11 exceeds the 10 of 12 steps left after the warm-up: use at most 10"),
        ("--decay_steps=5", "decay_steps=5 exceeds the 4 of 12 steps left after the checkpoint"),
    ],
)
def test_what_cannot_continue_is_refused(changed, message, trunk, tiny_directory, tiny_data, tmp_path, monkeypatch):
    begin = f"--continue_from={trunk / 'checkpoints' / 'step-000008'}"
    command = flags(tiny_directory, tiny_data, tmp_path, 12, CONSTANT, begin, changed)
    assert message in error_of(monkeypatch, "train", *command)
    assert not (tmp_path / "settings.json").exists()


def test_a_run_that_is_flat_decays_and_ends_and_resumes_exactly(tiny_directory, tiny_data, tmp_path):
    """Nothing is learned at so low a rate. 2 steps of warm-up, 10 that are judged, 4 of decay."""
    more = ["--lr=1e-9", "--stop_when_flat=10", "--decay_steps=4", "--save_every=1", "--max_loss_ratio=0"]
    command = flags(tiny_directory, tiny_data, tmp_path, 60, *more)
    said = finish(start_training(1, *command))
    assert "step 12: the KL no longer falls; the run ends at step 16" in said
    whole = log_of(tmp_path)
    assert [lr for _, _, lr, _ in whole][11:] == pytest.approx(
        [1e-9, *(1e-9 * (1 + math.cos(math.pi * n / 4)) / 2 for n in range(4))]
    )
    (tmp_path / "uninterrupted").mkdir()
    shutil.move(tmp_path / "final", tmp_path / "uninterrupted" / "final")
    for stopped_at in (14, 7):  # while the learning rate falls, and while it is constant
        for folder in (tmp_path / "checkpoints").glob("step-*"):
            if int(folder.name.removeprefix("step-")) > stopped_at:
                shutil.rmtree(folder)
        finish(start_training(1, *command))
        assert log_of(tmp_path) == whole
        assert_same_weights(tmp_path, tmp_path / "uninterrupted")
        shutil.rmtree(tmp_path / "final")


def test_flat_is_what_chance_can_explain():
    """The slope and its error are those of the textbook; noise alone is flat, save for one time in 40."""
    values = [3.0, 1.0, 2.0, 0.0]
    slope, stderr = plateau.slope_of(values)
    assert slope == pytest.approx(-0.8)
    assert stderr == pytest.approx(math.sqrt(1.8 / 2 / 5))
    draw = random.Random(0)
    noise = [[draw.gauss(1, 0.1) for _ in range(50)] for _ in range(400)]
    assert 0.95 < sum(map(plateau.is_flat, noise)) / 400 < 0.995
    fall = 7 * 0.1 / math.sqrt(50) * 2  # twice what can be seen
    falling = [[value - fall * place / 50 for place, value in enumerate(values)] for values in noise]
    assert sum(map(plateau.is_flat, falling)) / 400 < 0.05


def test_a_constant_rate_between_warm_up_and_decay():
    config = TrainConfig(steps=20, warmup_steps=4, decay_steps=8, min_lr_ratio=0.1)
    assert [config.lr_factor(step) for step in (0, 3, 4, 12, 16, 20)] == pytest.approx([0.25, 1, 1, 1, 0.55, 0.1])
    check_schedule(TrainConfig(steps=21, warmup_steps=4, decay_steps=4, stop_when_flat=12))
    with pytest.raises(UserError, match=r"test the KL at step 16, but .* decays from step 16: .* more than 20 --steps"):
        check_schedule(TrainConfig(steps=20, warmup_steps=4, decay_steps=4, stop_when_flat=12))
    branch = TrainConfig(steps=48, warmup_steps=4, decay_steps=4, stop_when_flat=12)
    check_schedule(branch, taken=16)
    with pytest.raises(UserError, match="would first test the KL at step 52"):
        check_schedule(branch, taken=29)
    for settings in ({"stop_when_flat": 100}, {"stop_when_flat": 9, "decay_steps": 4}, {"decay_steps": -1}):
        with pytest.raises(UserError):
            TrainConfig(**settings)
