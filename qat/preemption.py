"""Stopping cleanly: a signal sets a flag, and the ranks agree on it at a step boundary."""

import signal
from types import FrameType

RESUMABLE_EXIT = 85
"""Exit code of a run that was told to stop, has saved, and can go on."""


class StopSignal:
    """True once SIGTERM or SIGUSR1 (what SLURM sends before it preempts) has come to this rank."""

    def __init__(self) -> None:
        self.received = False
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = True
