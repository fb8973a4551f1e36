"""Runs the real commands one after another, and stops them cleanly."""

import contextlib
import json
import os
import random
import shlex
import signal
import socket
import subprocess
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from qat.runtime.errors import UserError
from qat.runtime.files import write_atomically, writing
from qat.runtime.preemption import RESUMABLE_EXIT

CPU_ONLY = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
"""Environment of stages that must run on the CPU even where there is a GPU."""

_STOP_SECONDS = 60


class Stages:
    """Runs the commands, and keeps the seconds that each took, over all starts, in the JSON file ``path``.

    Args:
        environment: variables of the commands, beside those of this process
        deadline: time.monotonic() at which a command that still runs is stopped; None for never
    """

    def __init__(self, path: Path, environment: Mapping[str, str], deadline: float | None = None):
        self.path, self.environment, self.deadline = path, environment, deadline
        self.seconds: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}

    def run(self, name: str, *parts: Iterable[object]) -> None:
        """Run a command to its end. Raises UserError if it fails, and KeyboardInterrupt if it was told to stop."""
        command = [str(argument) for part in parts for argument in part]
        began = time.monotonic()
        if self.deadline is not None and began >= self.deadline:
            raise KeyboardInterrupt
        print(f"\n[{name}] $ {shlex.join(command)}", flush=True)
        process = subprocess.Popen(command, env=os.environ | self.environment, start_new_session=True)
        try:
            code = process.wait(None if self.deadline is None else self.deadline - began)
        except (KeyboardInterrupt, subprocess.TimeoutExpired):
            _stop(process)
            raise KeyboardInterrupt from None
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - began
            with writing(self.path):
                write_atomically(self.path, json.dumps(self.seconds, indent=2) + "\n")
        if code == RESUMABLE_EXIT:
            raise KeyboardInterrupt
        if code != 0:
            raise UserError(f"The stage {name!r} failed (exit code {code}); its message is above.")

    @property
    def minutes(self) -> float:
        """Return how long all stages took, those of earlier starts too."""
        return sum(self.seconds.values()) / 60


def interrupt() -> None:
    """Raise KeyboardInterrupt, as Ctrl-C does; for ``handle_signals``."""
    raise KeyboardInterrupt


def free_port() -> str:
    """Return a port that no process uses, below those that the kernel gives to connections: one of them might have it
    before the ranks do."""
    while True:
        port = random.SystemRandom().randint(20000, 32000)  # two processes must not draw the same
        with socket.socket() as trial, contextlib.suppress(OSError):
            trial.bind(("127.0.0.1", port))
            return str(port)


def _stop(process: subprocess.Popen) -> None:
    """Tell the stage and all its processes to stop, and wait until they have: a training run saves first."""
    print("\nstopping ...", flush=True)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        for _ in range(_STOP_SECONDS * 5):
            process.poll()
            os.killpg(process.pid, 0)  # raises when the last of them has ended
            time.sleep(0.2)
