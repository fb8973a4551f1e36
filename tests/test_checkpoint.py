"""Checkpoints: what is damaged is passed over, what cannot be written costs nothing, and no code is run that they hold.
A real engine, on one rank."""

import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from commands import ROOT
from faults import flip, full_disk
from make_fixtures import FIXTURES

from qat.runtime.errors import UserError
from qat.runtime.files import MANIFEST
from qat.store import manifest, student_folder
from qat.store.run_folder import LATEST
from qat.train import checkpoint, deepspeed_internals, engines, universal
from qat.train.checkpoint import TrainState, _superseded
from qat.train.log import RunLog

OPTIMIZER_FILE = "zero_pp_rank_0_mp_rank_00_optim_states.pt"
FILES = [OPTIMIZER_FILE, "zero_pp_rank_0_mp_rank_00_model_states.pt"]


@pytest.fixture(scope="module", autouse=True)
def one_rank():
    """This process as the only rank. What other tests' processes inherit stays as it was."""
    before = dict(os.environ)
    engines.init_distributed()
    yield
    torch.distributed.destroy_process_group()
    os.environ.clear()
    os.environ.update(before)


def engine(seed: int = 0, **settings: Any) -> deepspeed.DeepSpeedEngine:
    torch.manual_seed(seed)
    config = json.loads((ROOT / "ds_configs" / "zero3_cpu.json").read_text())
    batch = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
    config |= batch | {"gradient_clipping": 0.0} | settings
    config["optimizer"]["params"]["lr"] = 0.01
    made, *_ = deepspeed.initialize(model=torch.nn.Linear(64, 64), config=config)
    return made


def learn(student: deepspeed.DeepSpeedEngine, step: int) -> float:
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(step)).to(student.device)
    loss = (student(x) - x.flip(1)).square().mean()
    student.backward(loss)
    student.step()
    return loss.item()


def train(student: deepspeed.DeepSpeedEngine, directory: Path, state: TrainState, steps: int, keep: int = 2):
    """Train to ``steps`` with a checkpoint every other step; the losses."""
    losses = []
    while state.step < steps:
        losses.append(learn(student, state.step))
        state.step += 1
        if state.step % 2 == 0:
            checkpoint.save(student, directory, state, keep)
    return losses


@pytest.fixture
def trained(tmp_path) -> Path:
    """Checkpoints of the steps 2, 4 and 6."""
    train(engine(), tmp_path / "checkpoints", TrainState(), 6, keep=3)
    return tmp_path / "checkpoints"


DAMAGES = {
    "another checksum": lambda folder: flip(folder / OPTIMIZER_FILE),
    "bytes, not": lambda folder: os.truncate(folder / OPTIMIZER_FILE, 1000),
    "is missing": lambda folder: (folder / OPTIMIZER_FILE).unlink(),
    "half-written": lambda folder: (folder / MANIFEST).unlink(),
    "manifest.json is damaged": lambda folder: (folder / MANIFEST).write_text('{"ranks": 1, "fil'),
}


@pytest.mark.parametrize("found", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_and_the_run_goes_on_exactly(found, trained, caplog):
    DAMAGES[found](trained / "step-000006")
    resumed = engine(seed=1)
    state = checkpoint.resume(resumed, trained)
    assert state.step == 4
    assert found in caplog.text
    uninterrupted = train(engine(), trained.parent / "other", TrainState(), 8)
    assert train(resumed, trained, state, 8) == uninterrupted[4:]
    assert checkpoint.resume(engine(seed=1), trained).step == 8, "what was damaged has been written anew"


def test_a_users_folders_among_the_checkpoints_are_kept_and_not_counted(trained, tmp_path):
    for name in ("step-000002-best", "step-best", "step-000004.bak", "universal-notes"):
        shutil.copytree(trained / "step-000002", trained / name)
    (trained / "step-000100").write_text("a file")
    shutil.move(trained / "step-000002", tmp_path / "elsewhere")
    (trained / "step-000002").symlink_to(tmp_path / "elsewhere")
    theirs = {path.name for path in trained.iterdir()} - {"latest", "step-000004", "step-000006"}
    (trained / "universal-step-000004").mkdir()
    resumed = engine(seed=1)
    state = checkpoint.resume(resumed, trained)
    assert state.step == 6
    train(resumed, trained, state, 8, keep=1)
    assert {path.name for path in trained.iterdir()} == theirs | {"latest", "step-000008"}
    assert (tmp_path / "elsewhere" / MANIFEST).exists()
    checkpoint.delete_all(trained)
    assert {path.name for path in trained.iterdir()} == theirs


def test_where_a_run_is_comes_back_whole(tmp_path, monkeypatch):
    student, state = engine(), TrainState(step=4, samples=8, tokens=160, seconds=1.5, average_loss=2.5, measured=4)
    learn(student, 0)
    checkpoint.save(student, tmp_path, state, keep=1)
    assert checkpoint.resume(engine(), tmp_path) == state
    older = {name: value for name, value in vars(state).items() if name != "measured"}
    monkeypatch.setattr(checkpoint, "asdict", lambda _: older)
    checkpoint.save(student, tmp_path, state, keep=1)
    assert checkpoint.resume(engine(), tmp_path) == TrainState(**older)


def test_a_run_does_not_continue_from_a_damaged_checkpoint_of_another(trained, tmp_path):
    begin = max(trained.glob("step-*"))
    assert checkpoint.resume(engine(), tmp_path / "new", begin).step > 0
    flip(begin / OPTIMIZER_FILE)
    with pytest.raises(UserError, match=r"step-\d+ is damaged: .* Give another checkpoint"):
        checkpoint.resume(engine(), tmp_path / "new", begin)


def test_a_run_whose_checkpoints_are_all_damaged_is_not_started_anew_in_silence(trained):
    for folder in trained.glob("step-*"):
        flip(folder / OPTIMIZER_FILE)
    with pytest.raises(UserError, match=r"Every checkpoint in .* is damaged"):
        checkpoint.resume(engine(), trained)


def test_a_run_that_was_killed_in_its_first_save_starts_anew(trained):
    (trained / LATEST).unlink()
    for folder in trained.glob("step-*"):
        (folder / MANIFEST).unlink()
    assert checkpoint.resume(engine(), trained) == TrainState()


def test_a_full_disk_costs_nothing(tmp_path):
    """No file of the next checkpoint may grow as large as those of the last: the kernel refuses the write."""
    folder, student, state = tmp_path / "full", engine(), TrainState()
    train(student, folder, state, 2, keep=1)
    largest = max(file.stat().st_size for file in (folder / "step-000002").iterdir())
    with full_disk(largest // 2), pytest.raises(UserError) as refusal:
        train(student, folder, state, 4, keep=1)
    assert re.search(r"step-000004 could not be written .*last complete .* is .*-000002", str(refusal.value))
    assert [path.name for path in folder.glob("step-*")] == ["step-000002"], "no half checkpoint fills the disk"
    resumed = engine(seed=1)
    state = checkpoint.resume(resumed, folder)
    assert train(resumed, tmp_path / "room", state, 6) == train(engine(), tmp_path / "other", TrainState(), 6)[2:]


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard writes in a thread
def test_a_full_disk_between_checkpoints_does_not_end_a_run(tmp_path, caplog):
    figures = {"loss": 1.0, "kl": 1.0, "tokens_per_second": 1.0}
    board = {"enabled": True, "output_path": str(tmp_path), "job_name": "tensorboard"}
    with RunLog(tmp_path / "log.jsonl", engine(tensorboard=board), TrainState(), steps=101) as log:
        with full_disk(64):
            for step in range(1, 101):
                log.step(TrainState(step=step, samples=step), figures)
        for name in ("log.jsonl", "TensorBoardMonitor"):
            assert caplog.text.count(f"{name} cannot be written ([Errno 27]") == 1
        log.step(TrainState(step=101, samples=101), figures)
    steps = [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps))
    assert steps[-1] == 101, "with room again, the log goes on"


def test_the_log_ends_with_the_loop_whatever_ends_it(tmp_path):
    """Its bar too, before the error is told: else that would stand in the bar's line."""
    path, begin = tmp_path / "log.jsonl", TrainState()
    with suppress(UserError), redirect_stderr(StringIO()) as said, RunLog(path, engine(), begin, steps=4) as log:
        log.step(TrainState(step=1, samples=1), {"loss": 2.0, "tokens_per_second": 1.0})
        raise UserError("the loss explodes")
    assert said.getvalue().splitlines()[-1].startswith("train:  25%")
    assert "loss=2.000" in said.getvalue()


class Planted:
    """Makes the folder ``mark`` when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def plant(file: Path, mark: Path) -> None:
    """Let what unpickles ``file`` make the folder ``mark``."""
    torch.save((torch.load(file, weights_only=False), Planted(mark)), file)
    torch.load(file, weights_only=False)
    mark.rmdir()


def sign(folder: Path, **changes: Any) -> None:
    """Make the manifest agree with the files, as whoever plants something would."""
    content = json.loads((folder / MANIFEST).read_text()) | changes
    (folder / MANIFEST).unlink()
    (folder / MANIFEST).write_text(json.dumps(content | {"files": manifest.entries(folder, 0, 1)}))


@contextmanager
def refused(mark: Path) -> Iterator[None]:
    with pytest.raises(UserError, match=r"would run code \(posix.mkdir\)"):
        yield
    assert not mark.exists()


def convert(folder: Path, output: Path, monkeypatch) -> int:
    """The converter, in this process; its exit code."""
    places = [f"--input_folder={folder}", f"--output_folder={output}"]
    monkeypatch.setattr(sys, "argv", ["universal", *places, "--num_extract_workers=1", "--num_merge_workers=1"])
    return universal.main()


@pytest.mark.parametrize("file", FILES)
def test_going_on_from_a_checkpoint_runs_no_code(file, trained, tmp_path, monkeypatch, capsys):
    folder, mark = trained / "step-000006", tmp_path / "mark"
    plant(folder / file, mark)
    sign(folder)
    with refused(mark):
        checkpoint.resume(engine(), trained)
    assert convert(folder, tmp_path / "universal", monkeypatch) == universal.REFUSED
    assert "would run code (posix.mkdir)" in capsys.readouterr().err
    assert not mark.exists()


UNIVERSAL_FILES = ("zero/optimizer_state.pt", "zero/weight/exp_avg.pt", FILES[1])


def test_going_on_with_another_number_of_ranks_runs_no_code(trained, tmp_path, monkeypatch):
    folder, converted, mark = trained / "step-000006", trained / "universal-step-000006", tmp_path / "mark"
    assert convert(folder, converted, monkeypatch) == 0
    sign(folder, ranks=2)
    assert checkpoint.resume(engine(), trained).step == 6
    for file in UNIVERSAL_FILES:
        sound = (converted / file).read_bytes()
        plant(converted / file, mark)
        with refused(mark):
            checkpoint.resume(engine(), trained)
        (converted / file).write_bytes(sound)
    shutil.rmtree(converted)
    plant(folder / OPTIMIZER_FILE, mark)
    sign(folder)
    with refused(mark):
        checkpoint.resume(engine(), trained)


@pytest.mark.parametrize("file", FILES)
def test_an_export_runs_no_code(file, tmp_path):
    (folder,) = (shutil.copytree(FIXTURES / "v1" / "stopped", tmp_path / "run") / "checkpoints").glob("step-*")
    assert list(student_folder.find(folder, str(FIXTURES / "v1" / "model")).weights())
    plant(folder / file, tmp_path / "mark")
    sign(folder)
    with refused(tmp_path / "mark"):
        list(student_folder.find(folder, str(FIXTURES / "v1" / "model")).weights())


def test_size_and_duration_are_written_down(trained):
    manifest = json.loads((trained / "step-000006" / MANIFEST).read_text())
    files = [path for path in (trained / "step-000006").iterdir() if path.name != MANIFEST]
    assert manifest["bytes"] == sum(path.stat().st_size for path in files)
    assert manifest["seconds"] >= 0
    assert manifest["ranks"] == 1
    assert sorted(manifest["files"]) == sorted(path.name for path in files)


@pytest.mark.parametrize(
    ("there", "half", "newest", "keep", "deleted"),
    [
        ([5, 10, 15], [], 15, 2, [5]),
        ([5, 10, 15], [], 15, 1, [5, 10]),
        ([10, 15, 20], [], 15, 1, [10, 20]),  # 20 is damaged, or the run would not have taken step 15 again
        ([10, 15, 20], [15], 20, 2, [15]),  # 15 was being written when a run was killed: it does not count
        ([5], [], 5, 2, []),
    ],
)
def test_the_newest_complete_checkpoints_are_kept(there, half, newest, keep, deleted, tmp_path):
    paths = {step: tmp_path / f"step-{step:06d}" for step in there}
    for step, path in paths.items():
        path.mkdir()
        if step not in half:
            (path / MANIFEST).touch()
    assert _superseded(list(paths.values()), paths[newest], keep) == [paths[step] for step in deleted]


@pytest.mark.parametrize(("rank", "expected"), [(0, 4), (1, 4), (2, 2), (3, 0)])
def test_a_ranks_part_is_read_without_its_padding(rank, expected, monkeypatch):
    """Which is memory that nothing was written to: 10 elements, by fours."""
    monkeypatch.setattr(dist, "get_rank", lambda: rank)
    monkeypatch.setattr(dist, "get_world_size", lambda: 4)
    part = SimpleNamespace(ds_tensor=torch.zeros(4), ds_numel=10)
    assert len(deepspeed_internals.own_part(part)) == expected
