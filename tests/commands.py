"""The commands, as tests start them, in processes or in this one, and some of their flags."""

import os
import signal
import subprocess
import sys
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import pytest
from forked import Command

from launch import cli

ROOT = Path(__file__).parent.parent
JSON = ROOT / "ds_configs" / "zero3_cpu.json"


def environment(compiled: bool = False) -> dict[str, str]:
    """Of the processes that tests start."""
    fixed = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    return os.environ | fixed | ({} if compiled else {"TORCHDYNAMO_DISABLE": "1"})


def start(
    ranks: int,
    script: str,
    *flags: object,
    compiled: bool = False,
    output: IO | None = None,
    errors: IO | None = None,
    cwd: Path = ROOT,
) -> Command:
    """``launch/<script>.py`` on CPU ranks, or, with none, as plain python runs it; see forked.py."""
    file = ROOT / "launch" / f"{script}.py"
    return Command(file, list(map(str, flags)), ranks, environment(compiled), cwd, output, errors)


def start_training(ranks: int, *flags: str, script: str = "train", **more: Any) -> Command:
    return start(ranks, script, *flags, **more)


def run_ranks(script: str, *flags: object, cwd: Path = ROOT) -> str:
    """An entry point on two ranks, to its end; its output."""
    return finish(start(2, script, *flags, cwd=cwd))


def run_python(script: str, *flags: str, cwd: Path = ROOT) -> SimpleNamespace:
    """An entry point as plain python runs it, to its end; its ``stdout`` and ``stderr``."""
    with tempfile.NamedTemporaryFile("r") as errors:
        process = start(0, script, *flags, cwd=cwd, errors=errors)
        process.wait(300)
        said = SimpleNamespace(stdout=process.said, stderr=errors.read())
    assert process.returncode == 0, said.stdout + said.stderr
    return said


def start_command(program: str, *arguments: object, cwd: Path = ROOT) -> subprocess.Popen:
    """A command line as users type it, without the forks' head start, in a process group of its own.

    Args:
        program: of the environment's bin/
    """
    command = [Path(sys.executable).parent / program, *map(str, arguments)]
    return subprocess.Popen(
        command, env=environment(), cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip


def finish(process: Command | subprocess.Popen) -> str:
    """Wait for the run; its output, which is also the message if it failed."""
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def kill(process: Command | subprocess.Popen) -> None:
    """SIGKILL to the launcher and all its ranks: nothing gets a chance to clean up."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def error_of(monkeypatch, script: str, *flags) -> str:
    """Run an entry point in this process, expecting it to refuse; its sentence."""
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, flags)])
    with pytest.raises(SystemExit) as stop, redirect_stderr(StringIO()) as printed:
        cli.run(import_module(f"launch.{script}").main)
    assert stop.value.code == 2
    *_, message = printed.getvalue().strip().splitlines()
    assert message.startswith("error: ")
    return message


def output_of(script: str, *flags: str) -> str:
    """An entry point in this process; what it printed."""
    sys.argv = [f"{script}.py", *flags]
    with redirect_stdout(StringIO()) as printed:
        import_module(f"launch.{script}").main()
    return printed.getvalue()


def run_in(vllm: Path, *command: object, **more) -> str:
    """A command in the environment whose bin folder is ``vllm``, see conftest.py; what it printed."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PATH": f"{vllm}:{os.environ['PATH']}"}
    done = subprocess.run([*map(str, command)], env=environment, cwd=ROOT, text=True, capture_output=True, **more)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def generate_flags(model: Path, output: Path) -> list[str]:
    sizes = ["--sequences=12", "--max_length=24", "--batch_size=3", "--sequences_per_shard=4"]
    return [f"--model={model}", f"--output={output}", *sizes]


def train_flags(model, data, output, deepspeed=JSON) -> list[str]:
    return [f"--model={model}", f"--data={data}", f"--output={output}", f"--deepspeed={deepspeed}"]
