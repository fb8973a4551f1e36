"""A launcher that is gone takes its ranks along; whatever started it does not."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from commands import ROOT, environment
from training import flags, log_of

from launch.stages import free_port
from qat.store.run_folder import CHECKPOINTS, LATEST

STARTER = "import subprocess, sys; subprocess.Popen(sys.argv[1:]).wait()"
RANK = """
import time
from qat.runtime import launcher
launcher.stop_with_launcher()
print(launcher.above(), flush=True)
time.sleep(600)
"""


@pytest.fixture
def started():
    """Processes that are gone after the test, with all that they started."""
    processes = []
    yield processes
    for process in processes:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def gone(processes: list[psutil.Process], seconds: float) -> bool:
    return not psutil.wait_procs(processes, timeout=seconds)[1]


@pytest.mark.parametrize("victim", ["a shell", "deepspeed", "deepspeed.launcher.launch"])
def test_a_rank_ends_with_its_launchers_and_outlives_what_started_them(victim, started, tmp_path):
    """As ``deepspeed`` does it: the rank is a grandchild. Of the launchers only the names are real."""
    command = [sys.executable, "-c", RANK]
    for name in ("deepspeed.launcher.launch", "deepspeed", "a shell"):
        (tmp_path / name).write_text(STARTER)
        command = [sys.executable, str(tmp_path / name), *command]
    started.append(subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True))
    line = started[0].stdout.readline()
    _, deepspeed, launch, rank = above = [
        psutil.Process(started[0].pid), *psutil.Process(started[0].pid).children(recursive=True)
    ]  # fmt: skip
    assert line == f"{[launch.pid, deepspeed.pid]}\n"
    next(process for process in above if victim in process.cmdline()[1]).kill()
    assert gone([rank], 3) == (victim != "a shell")


@pytest.mark.parametrize("variable", ["CROSS_SIZE", "TORCHELASTIC_RUN_ID"])
def test_a_rank_whose_launcher_ended_while_it_was_importing_ends(variable, tmp_path):
    rank = f"{sys.executable} -c '{RANK}'; echo $? > {tmp_path / 'code'}"
    orphan = ["sh", "-c", f"({rank}) > {tmp_path / 'said'} 2>&1 &"]  # its parent ends at once
    subprocess.run(orphan, cwd=ROOT, env=environment() | {variable: "1"}, check=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "code").exists() or not (tmp_path / "code").read_text():
        assert time.monotonic() < deadline, (tmp_path / "said").read_text()
        time.sleep(0.05)
    assert int((tmp_path / "code").read_text()) == 128 + signal.SIGTERM


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "number"),
    [(launcher, number) for launcher in ("deepspeed", "torchrun") for number in (signal.SIGTERM, signal.SIGKILL)],
)
def test_training_saves_and_ends_with_its_launcher(launcher, number, started, tiny_directory, tiny_data, tmp_path):
    run = tmp_path / "run"
    ranks = {"deepspeed": "--num_gpus=2", "torchrun": "--nproc_per_node=2"}[launcher]
    command = [
        str(Path(sys.executable).parent / launcher), ranks, f"--master_port={free_port()}",
        str(ROOT / "launch" / "train.py"), *flags(tiny_directory, tiny_data, run), "--steps=100000",
        "--save_every=100000",
    ]  # fmt: skip
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            command, env=environment(), cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    started.append(process)
    while not (run / "log.jsonl").exists() or len(log_of(run)) < 3:
        assert process.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.05)
    below = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    process.wait(60)
    assert gone(below, 60)
    said = (tmp_path / "log").read_text()
    # torchrun ends in a traceback of its own, through its package of this name.
    assert "error" not in said.replace("exits with return code", "").replace("multiprocessing/errors/", ""), said
    assert (run / CHECKPOINTS / LATEST).read_text() == f"step-{len(log_of(run)):06}"
    assert "stopped by a signal and saved" in said
