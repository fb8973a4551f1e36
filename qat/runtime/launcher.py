"""The launcher above a rank: when it has ended, the rank stops as if told to.

``deepspeed`` starts a process that starts the ranks. If it is killed, these would otherwise continue unseen, with the
folder locked. Only launchers count: the process that started a launcher (a shell, nohup, sbatch) may end before it.
"""

import os
import signal
import threading
import time
from pathlib import Path

import psutil

_PROGRAMS = {
    "deepspeed",
    "deepspeed.launcher.runner",
    "deepspeed.launcher.launch",
    "torchrun",
    "torch.distributed.run",
    "torch.distributed.launch",
}

_TRIES = 100

_STARTED_BY = ("CROSS_SIZE", "TORCHELASTIC_RUN_ID")
"""Variables that deepspeed.launcher.launch and torchrun set for their ranks."""


def stop_with_launcher() -> None:
    """Send this process a SIGTERM once one of the launchers above it has ended, even if that was before this call;
    without a launcher, do nothing."""
    started_by = above()
    if not started_by and _is_orphan():
        os.kill(os.getpid(), signal.SIGTERM)
    elif started_by:
        threading.Thread(target=_wait, args=(started_by,), name="watch of the launcher", daemon=True).start()


def above() -> list[int]:
    """Return the process ids of the launchers that this process descends from, nearest first."""
    for _ in range(_TRIES):
        try:
            return [process.pid for process in psutil.Process().parents() if _is_launcher(process.cmdline())]
        except psutil.NoSuchProcess:  # one has just ended: others are above this process now
            time.sleep(0.01)
        except psutil.AccessDenied:  # /proc hides those of other users
            break
    return []


def _is_orphan() -> bool:
    """Return whether a launcher started this process, and ended while it was importing. Other programs than those above
    can start ranks with the same variables; they too run in Python."""
    if not any(name in os.environ for name in _STARTED_BY):
        return False
    try:
        commands = [process.cmdline() for process in psutil.Process().parents()]
    except psutil.Error:
        return False
    return not any("python" in Path(command[0]).name for command in commands if command)


def _is_launcher(command: list[str]) -> bool:
    """Return whether the command is ``python [-u] [-m] LAUNCHER ...``."""
    program = next((part for part in command[1:] if not part.startswith("-")), "")
    return Path(program).name in _PROGRAMS and "python" in Path(command[0]).name


def _wait(started_by: list[int]) -> None:
    while above() == started_by:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)
