"""What a run says: one JSON line a step in ``log.jsonl``, a progress bar, and DeepSpeed's monitors."""

import json
from pathlib import Path
from typing import Any

import deepspeed

from qat import memory, progress
from qat.checkpoint import TrainState
from qat.files import read_lines, write_atomically, writing


class RunLog:
    """The first rank's log.

    Args:
        path: the file; what it holds of steps after ``state.step``, which are taken again, is dropped
        student: its monitors (TensorBoard, Weights & Biases, as the DeepSpeed JSON says) get the same figures
    """

    def __init__(self, path: Path, student: deepspeed.DeepSpeedEngine, state: TrainState, steps: int):
        kept = [record for record in read_lines(path) if record["step"] <= state.step] if path.exists() else []
        with writing(path):
            write_atomically(path, "".join(json.dumps(record) + "\n" for record in kept))
            self._path, self._file, self._steps = path, path.open("a", buffering=1), steps
        self._monitor = student.monitor
        self._bar = progress.bar(desc="train", total=steps, initial=state.step, unit="step")

    def step(self, state: TrainState, figures: dict[str, Any]) -> None:
        """Write one step's figures; raises UserError if the file cannot be written."""
        record = {
            "step": state.step,
            **figures,
            "tokens": state.tokens,
            "seconds": round(state.seconds, 2),
            "eta_seconds": round(state.seconds / state.step * (self._steps - state.step)),
            "memory_gb": round(memory.peak() / 1e9, 3),
        }
        with writing(self._path):
            self._file.write(json.dumps(record) + "\n")
        if self._monitor.enabled:
            numbers = {name: value for name, value in record.items() if isinstance(value, int | float)}
            # By samples, as DeepSpeed's own events are: Weights & Biases ignores what comes under a lower number.
            self._monitor.write_events([(f"train/{name}", value, state.samples) for name, value in numbers.items()])
        shown = {name: f"{figures[name]:.3f}" for name in ("loss", "kl")}
        self._bar.set_postfix(shown | {"tok_s": f"{figures['tokens_per_second']:.0f}"}, refresh=False)
        self._bar.update()
