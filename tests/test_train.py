"""Real runs: ``deepspeed launch/train.py``, ZeRO-3, on CPU ranks."""

import json
import os
import signal
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from conftest import ROOT, finish, kill, start_training
from safetensors.torch import load_file
from test_launch import error_of

from qat import export, models
from qat.data import TrainingData
from qat.distill import Distiller, TeacherTargets, predicting
from qat.prepare import QuantConfig, integer_product, multiply_integers, prepare
from qat.training import TrainConfig

STEPS = 12  # two passes over the 12 sequences
CONFIG = TrainConfig(steps=STEPS, lr=1e-3, warmup_steps=2)
QUANT = QuantConfig(w_bits=3)  # coarse: much to learn in few steps


def flags(model: Path, data: Path, output: Path, ds_config: str = "zero3_cpu.json") -> list[str]:
    places = [f"--model={model}", f"--data={data}", f"--output={output}"]
    json_file = f"--deepspeed={ROOT / 'ds_configs' / ds_config}"
    return [
        *places,
        json_file,
        f"--steps={STEPS}",
        "--lr=1e-3",
        "--warmup_steps=2",
        "--w_bits=3",
        "--save_every=5",
    ]


def log_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[tuple[float, float, float]]:
    return [(record["loss"], record["kl"], record["grad_norm"]) for record in log_of(run)]


@pytest.fixture(scope="module")
def run(tiny_directory, tiny_data, tmp_path_factory) -> Path:
    """An uninterrupted run on two ranks."""
    output = tmp_path_factory.mktemp("run") / "whole"
    finish(start_training(2, *flags(tiny_directory, tiny_data, output)))
    return output


@pytest.fixture(scope="module")
def weights(run) -> dict[str, torch.Tensor]:
    return load_file(run / "final" / "model.safetensors")


def test_the_loss_falls(run):
    kl = [record["kl"] for record in log_of(run)]
    assert len(kl) == STEPS
    assert sum(kl[6:]) < 0.8 * sum(kl[:6]), "the second pass over the data, against the first"


def test_two_sharded_ranks_equal_one_plain_process(run, weights, tiny_directory, tiny_data):
    """The same global batches in plain PyTorch: no DeepSpeed, no sharding, no checkpointing."""
    model, tokenizer = str(tiny_directory), models.load_tokenizer(str(tiny_directory))
    teacher = models.load(model, torch.float32)
    student = Distiller(prepare(models.load(model, torch.float32), QUANT).train())
    if product := integer_product(QUANT, torch.device("cpu"), torch.float32):
        multiply_integers(student, product)
    data = TrainingData(tiny_data, tokenizer, CONFIG.seed)
    optimizer = torch.optim.AdamW(student.parameters(), CONFIG.lr, weight_decay=0.0, fused=True)
    for step, record in enumerate(log_of(run)):
        optimizer.param_groups[0]["lr"] = CONFIG.lr * CONFIG.lr_factor(step)
        optimizer.zero_grad()
        total = 0.0
        for number in (2 * step, 2 * step + 1):
            ids = data.sample(number).input_ids
            with torch.no_grad():
                targets = TeacherTargets(predicting(teacher, ids), lambda: nullcontext(teacher.lm_head.weight))
            loss, _ = student(ids, targets)
            (loss / 2).backward()
            total += loss.item() / 2
        norm = torch.nn.utils.clip_grad_norm_(student.parameters(), CONFIG.gradient_clipping)
        optimizer.step()
        assert record["loss"] == pytest.approx(total, rel=1e-5), f"step {step}"
        assert record["grad_norm"] == pytest.approx(norm.item(), rel=1e-3), f"step {step}"
    ours = dict(student.student.named_parameters())
    for name, weight in weights.items():
        torch.testing.assert_close(ours[name].data, weight, rtol=0, atol=2e-4, msg=name)


def test_killed_and_resumed_equals_uninterrupted(run, weights, tiny_directory, tiny_data, tmp_path):
    output = tmp_path / "killed"
    process = start_training(2, *flags(tiny_directory, tiny_data, output))
    while process.poll() is None and not (output / "checkpoints" / "latest").exists():
        time.sleep(0.02)
    assert process.poll() is None, process.communicate()[0]
    kill(process)
    assert not (output / "final").exists(), "the run must be killed before its end for this test to say anything"
    finish(start_training(2, *flags(tiny_directory, tiny_data, output)))
    assert losses(output) == losses(run)
    resumed = load_file(output / "final" / "model.safetensors")
    assert all(torch.equal(resumed[name], weight) for name, weight in weights.items())


def test_a_signal_saves_and_the_run_goes_on(run, weights, tiny_directory, tiny_data, tmp_path):
    output = tmp_path / "signalled"
    process = start_training(1, *flags(tiny_directory, tiny_data, output), "--gradient_accumulation_steps=2")
    while process.poll() is None and not (output / "log.jsonl").exists():
        time.sleep(0.02)
    assert process.poll() is None, process.communicate()[0]
    os.killpg(process.pid, signal.SIGTERM)
    process.communicate(timeout=120)
    saved = (output / "checkpoints" / "latest").read_text()
    assert int(saved.removeprefix("step-")) == len(log_of(output)) < STEPS
    finish(start_training(1, *flags(tiny_directory, tiny_data, output), "--gradient_accumulation_steps=2"))
    # One rank that accumulates two sequences takes the same global batches as two ranks.
    for one, two in zip(losses(output), losses(run), strict=True):
        assert one == pytest.approx(two, rel=1e-3)


def test_the_trained_student_exports_and_reloads_bit_for_bit(run, tmp_path):
    export.export(run / "final", tmp_path / "export", check=False)
    ids = torch.arange(2, 50)[None]
    in_memory = export.load(str(run / "final"), torch.float32)
    reloaded = export.load(str(tmp_path / "export"), torch.float32)
    assert torch.equal(in_memory(ids).logits, reloaded(ids).logits)


def test_the_gpu_configuration_computes_in_bf16(run, tiny_directory, tiny_data, tmp_path):
    """Same JSON as on GPUs, here on two CPU ranks: bf16 compute, fp32 master weights."""
    output = tmp_path / "bf16"
    finish(start_training(2, *flags(tiny_directory, tiny_data, output, "zero3.json")))
    assert all(weight.dtype == torch.bfloat16 for weight in load_file(output / "final" / "model.safetensors").values())
    for bf16, fp32 in zip(losses(output), losses(run), strict=True):
        assert bf16[0] == pytest.approx(fp32[0], rel=0.02)


def test_a_finished_run_is_left_alone(run, tiny_directory, tiny_data):
    before = (run / "final" / "model.safetensors").stat().st_mtime_ns
    finish(start_training(2, *flags(tiny_directory, tiny_data, run)))
    assert (run / "final" / "model.safetensors").stat().st_mtime_ns == before


def test_a_run_is_not_gone_on_with_under_other_settings(run, tiny_directory, tiny_data, monkeypatch):
    message = error_of(monkeypatch, "train", *flags(tiny_directory, tiny_data, run), "--lr=5e-4", "--a_bits=6")
    assert "a_bits was 8, now 6, lr was 0.001, now 0.0005" in message


def test_only_so_many_checkpoints_are_kept(run):
    names = sorted(path.name for path in (run / "checkpoints").glob("step-*"))
    assert names == ["step-000010", f"step-{STEPS:06d}"]
    assert (run / "checkpoints" / "latest").read_text() == f"step-{STEPS:06d}"
