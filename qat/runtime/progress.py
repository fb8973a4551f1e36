"""Progress bars: redrawn on a terminal, an occasional line in a log file."""

import logging
import sys
from collections.abc import Iterable
from typing import Any, TextIO

from tqdm import tqdm

_SECONDS = 60.0
"""Seconds between two lines of a log file."""


def bar(steps: Iterable[Any] | None = None, **how: Any) -> tqdm:
    """Return a tqdm bar on standard error; ``how`` are tqdm's arguments.

    Set its postfix with ``refresh=False``: the next due update shows it. There is one bar at a time, in one place: tqdm
    itself would put it below another one that is still open.
    """
    how["position"] = 0
    if sys.stderr.isatty():
        return tqdm(steps, dynamic_ncols=True, **how)
    return tqdm(steps, file=_Lines(sys.stderr), ascii=True, mininterval=_SECONDS, miniters=1, **how)


class LogHandler(logging.Handler):
    """Writes log messages to standard error, above the bar and not into its line."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


class _Lines:
    """A stream that turns redrawn text into lines."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> None:
        if line := text.strip():
            self._stream.write(f"{line}\n")

    def flush(self) -> None:
        self._stream.flush()
