"""Stopping cleanly: a signal sets a flag, and the ranks agree on it at a step boundary."""

import signal
from types import FrameType

RESUMABLE_EXIT = 85
"""Exit code of a run that was told to stop, has saved, and can go on."""


class StopSignal:
    """Remembers whether this rank was told to stop: by SIGTERM, by Ctrl-C, or by SLURM's SIGUSR1."""

    def __init__(self) -> None:
        self.received = False
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = True
