"""Stopping cleanly: a signal sets a flag, and the ranks agree on it at a step boundary."""

import os
import signal
from collections.abc import Callable
from types import FrameType

RESUMABLE_EXIT = 85
"""Exit code of a run that was told to stop, has saved, and can resume."""

_STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


class StopSignal:
    """Records whether this rank was told to stop: by SIGTERM, by Ctrl-C, by SLURM's SIGUSR1, or by SIGHUP, when its
    terminal is lost (with an ssh connection)."""

    def __init__(self) -> None:
        self.received = False
        handle_signals(self._receive)

    def _receive(self) -> None:
        self.received = True


def handle_signals(handler: Callable[[], None]) -> None:
    """Call ``handler`` when this process is told to stop. An ignored SIGHUP stays ignored: nohup asks to continue."""
    terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]

    def handle(number: int, frame: FrameType | None) -> None:
        _mute_lost(terminals)
        handler()

    for number in _STOPPING:
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handle)


def _mute_lost(terminals: list[int]) -> None:
    """Discard what is printed to a lost terminal: it would raise an error, and end the run unsaved."""
    for descriptor in terminals:
        if not os.isatty(descriptor):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)
