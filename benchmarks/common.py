"""What the benchmarks share: the machine's name, fair timing, and the file of figures."""

import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from qat.runtime.machine import machine


def median_seconds(alternatives: Mapping[str, Callable[[], object]], repeats: int = 5) -> dict[str, float]:
    """Median seconds of one call of each alternative.

    The calls take turns, so that a machine that slows down slows all of them. One call of each comes
    first and is not counted: compilation and warm caches are not what is compared.
    """
    seconds: dict[str, list[float]] = {name: [] for name in alternatives}
    for turn in range(repeats + 1):
        for name, call in alternatives.items():
            synchronize()
            began = time.perf_counter()
            call()
            synchronize()
            if turn:
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def write(path: Path | None, figures: Mapping[str, float]) -> None:
    """Print the figures and, if a path is given (``--json``), write them there with the machine's name."""
    for name, value in figures.items():
        print(f"{name}: {value:.4g}")
    if path:
        path.write_text(json.dumps({"machine": machine(), "figures": dict(figures)}, indent=2) + "\n")


def synchronize() -> None:
    """Wait until the GPU, if there is one, has done what it was told."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
