"""The commands without the seconds that their imports take: forked from a process that has imported all of them.

That process, multiprocessing's forkserver, has computed nothing and started no thread. A fork runs the script as
``__main__``, like ``python launch/train.py``, or like ``deepspeed launch/train.py`` on several ranks.
"""

import atexit
import gc
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import wait
from pathlib import Path
from types import SimpleNamespace
from typing import IO

import compiler

import launch
from launch import stages
from launch.stages import free_port

IMPORTED = [
    *(f"launch.{file.stem}" for file in sorted(Path(launch.__file__).parent.glob("[!_]*.py"))),
    *("deepspeed", "matplotlib.pyplot", "qat.train.checkpoint", "qat.train.loop", "qat.train.losses"),
    *("torch._inductor.compile_fx", "torch.utils.tensorboard"),
    *("transformers.models.auto.modeling_auto", "transformers.models.llama.modeling_llama"),
]
"""The commands, and what most of them import later: it takes seconds."""

_STOP_SECONDS = 30
"""As DeepSpeed's launcher has it."""


def processes() -> multiprocessing.context.ForkServerContext:
    """Makes processes that have imported the commands; the first one takes the seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    return context


def run_ranks(target: Callable[..., None], number: int, *given: object) -> None:
    """Run ``target(rank, *given)`` as each of so many ranks; all of them must end well."""
    port = free_port()
    ranks = [processes().Process(target=_as_rank, args=(target, rank, number, port, given)) for rank in range(number)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert [rank.exitcode for rank in ranks] == [0] * number


def _as_rank(target: Callable[..., None], rank: int, number: int, port: str, given: tuple[object, ...]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(number)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(number), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    compiler.switch_off()
    target(rank, *given)


class Command:
    """A running command, in a process group of its own, with what the tests use of subprocess.Popen.

    Args:
        script: its file
        ranks: as many ranks as the launcher of DeepSpeed would start; 0 for the script alone, without a launcher
        environment: all of its variables, but for those of the ranks
        output: open file for what it says, by default one of its own; what it says on stderr can have another
    """

    def __init__(
        self,
        script: Path,
        flags: Sequence[str],
        ranks: int,
        environment: Mapping[str, str],
        cwd: Path,
        output: IO | None = None,
        errors: IO | None = None,
    ):
        self._output = output or tempfile.NamedTemporaryFile("w+")  # noqa: SIM115
        files = [self._output.name, (errors or self._output).name]
        arguments = (str(script), list(flags), ranks, dict(environment), str(cwd), files)
        self._process = processes().Process(target=_start, args=arguments)
        self._process.start()
        self.pid = self._process.pid
        with suppress(ProcessLookupError):  # it may have ended already
            while os.getpgid(self.pid) != self.pid:
                time.sleep(0.001)

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int | None:
        """Wait for the end; the exit code."""
        self._process.join(timeout)
        assert self.returncode is not None, f"still running after {timeout} s: {self.said}"
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        """Wait for the end; what was said."""
        self.wait(timeout)
        return self.said, None

    @property
    def said(self) -> str:
        """So far."""
        return Path(self._output.name).read_text()

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)


def _start(script: str, flags: list[str], ranks: int, environment: dict[str, str], cwd: str, files: list[str]) -> None:
    """The command's first process: the script, or, like a launcher, the one that waits for the ranks."""
    gc.freeze()  # what was imported is no garbage: looking for it there would take a third of a second each time
    os.setsid()
    os.chdir(cwd)
    for stream, file in zip((sys.stdout, sys.stderr), files, strict=True):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), stream.fileno())
        stream.reconfigure(line_buffering=True)
    os.environ.clear()
    os.environ.update(environment)
    if ranks == 0:
        _run(script, flags)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": str(ranks)}
    os.environ |= {"LOCAL_SIZE": str(ranks), "CROSS_RANK": "0", "CROSS_SIZE": "1"}
    forks = [multiprocessing.get_context("fork").Process(target=_rank, args=(n, script, flags)) for n in range(ranks)]
    for fork in forks:
        fork.start()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the ranks stop by it, and are waited for
    while running := [fork.sentinel for fork in forks if fork.exitcode is None]:
        wait(running)
        if any(fork.exitcode for fork in forks):
            break
    for fork in forks:  # when one has failed, the others are told to stop, and later made to
        fork.terminate()
    for fork in forks:
        fork.join(_STOP_SECONDS)
        fork.kill()
        fork.join()
    sys.exit(next((fork.exitcode for fork in forks if fork.exitcode), 0))


def _rank(number: int, script: str, flags: list[str]) -> None:
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number)}
    _run(script, [f"--local_rank={number}", *flags])


class _Stage:
    """A command of ``launch.stages``, forked too; what that uses of subprocess.Popen."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str], start_new_session: bool):
        assert start_new_session
        place = next(number for number, part in enumerate(command) if part.endswith(".py"))
        given = [part.removeprefix("--num_gpus=") for part in command[:place] if part.startswith("--num_gpus=")]
        files = [f"/proc/{os.getpid()}/fd/{stream.fileno()}" for stream in (sys.stdout, sys.stderr)]
        arguments = (command[place], command[place + 1 :], int(given[0]) if given else 0, dict(env), os.getcwd(), files)
        self._process = multiprocessing.get_context("fork").Process(target=_start, args=arguments)
        self._process.start()
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self._process.name, timeout)
        return self._process.exitcode


def _run(script: str, flags: list[str]) -> None:
    """Become the script; to its end. The commands that it starts in turn are forked too."""
    stages.subprocess = SimpleNamespace(Popen=_Stage, TimeoutExpired=subprocess.TimeoutExpired)
    sys.argv = [script, *flags]
    sys.path.insert(0, str(Path(script).parent))
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # which multiprocessing leaves out
