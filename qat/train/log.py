"""The output of a run: one JSON line per step in ``log.jsonl``, a progress bar, and DeepSpeed's monitors."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from qat.runtime import memory, progress
from qat.runtime.errors import first_line
from qat.runtime.files import read_lines, write_atomically, writing
from qat.train.checkpoint import TrainState

if TYPE_CHECKING:
    import deepspeed

PERPLEXITY = "ppl_"
"""Prefix of the names of the figures that were measured on held-out texts; the text's name follows."""

_log = logging.getLogger(__name__)


class RunLog:
    """The first rank's log, a context manager. Once started it never ends a run: a failure to write (a full disk, a
    lost network) causes one warning, and is retried with the next step.

    Args:
        path: the file; what it holds of steps after ``state.step``, which are taken again, is dropped
        student: its monitors (TensorBoard, Weights & Biases, by the DeepSpeed JSON) get the same figures

    Raises UserError if the file cannot be written when the run starts.
    """

    def __init__(self, path: Path, student: deepspeed.DeepSpeedEngine, state: TrainState, steps: int):
        kept = [record for record in read_lines(path) if record["step"] <= state.step] if path.exists() else []
        with writing(path):
            write_atomically(path, "".join(json.dumps(record) + "\n" for record in kept))
            self._path, self._file, self._steps = path, path.open("a", buffering=1), steps
        master = student.monitor
        monitors = (master.tb_monitor, master.wandb_monitor, master.csv_monitor, master.comet_monitor)
        self._monitors = [monitor for monitor in monitors if monitor is not None]
        self._warned = set[str]()
        self._bar = progress.bar(desc="train", total=steps, initial=state.step, unit="step")

    def __enter__(self) -> Self:
        self._uncaught, threading.excepthook = threading.excepthook, self._in_a_thread
        return self

    def __exit__(self, *_: object) -> None:
        threading.excepthook = self._uncaught
        self._try("the progress bar", self._bar.close)
        self._try(str(self._path), self._file.close)

    def step(self, state: TrainState, figures: dict[str, Any]) -> None:
        """Write one step's figures."""
        record = {
            "step": state.step,
            **figures,
            "tokens": state.tokens,
            "seconds": round(state.seconds, 2),
            "eta_seconds": round(state.seconds / state.step * (self._steps - state.step)),
            "memory_gb": round(memory.peak() / 1e9, 3),
        }
        self._try(str(self._path), self._file.write, json.dumps(record) + "\n")
        # By samples, as DeepSpeed's own events are: Weights & Biases ignores events with a lower number than before.
        numbers = {name: value for name, value in record.items() if isinstance(value, int | float)}
        events = [(f"train/{name}", value, state.samples) for name, value in numbers.items()]
        for monitor in self._monitors:
            self._try(type(monitor).__name__, monitor.write_events, events)
        for name, value in figures.items():
            if name.startswith(PERPLEXITY):
                text = name.removeprefix(PERPLEXITY)
                _log.info("step %d: perplexity %.3f on the held-out %s", state.step, value, text)
        self._try("the progress bar", self._show, figures)

    def ends_early(self, state: TrainState, steps: int) -> None:
        """Say that the KL no longer falls, and that the run ends after ``steps``."""
        _log.info("step %d: the KL no longer falls; the run ends at step %d", state.step, steps)
        self._bar.total = self._steps = steps

    def _show(self, figures: dict[str, Any]) -> None:
        shown = {name: f"{figures[name]:.3f}" for name in ("loss", "kl") if name in figures}
        self._bar.set_postfix(shown | {"tok_s": f"{figures['tokens_per_second']:.0f}"}, refresh=False)
        self._bar.update()

    def _in_a_thread(self, failed: threading.ExceptHookArgs) -> None:
        """Print an exception that ended a thread, but not why TensorBoard's cannot write: ``write_events`` raises that
        too."""
        is_tensorboard = type(failed.thread).__module__.startswith("tensorboard.")
        if not (is_tensorboard and issubclass(failed.exc_type, OSError)):
            self._uncaught(failed)

    def _try(self, what: str, write: Callable[..., object], *given: object) -> None:
        try:
            write(*given)
        except Exception as error:  # Weights & Biases and Comet have their own
            if what not in self._warned:
                self._warned.add(what)
                _log.warning("warning: %s cannot be written (%s): the run continues without.", what, first_line(error))
