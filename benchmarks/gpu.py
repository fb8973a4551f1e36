"""All that only a GPU can show, by one command on one GPU: the same numbers as on a CPU, training that is that of plain
PyTorch, what quantization costs, and how near generation is to the machine's limits.

python benchmarks/gpu.py --json docs/gpu/NAME.json

It needs torch, transformers and the packages of docs/gpu/README.md. Each check stands for itself: one that fails is
reported, and the others go on. The file is written after every check. Without a GPU the same checks run small.
"""

import gc
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from gpu_checks import generation, limits, numerics, speed, training
from gpu_checks.bench import SMALL, Bench, Shapes

from launch import cli
from qat.runtime.errors import UserError, first_line
from qat.runtime.files import read_lines, write_atomically
from qat.runtime.machine import machine

Check = Callable[[Bench], tuple[dict, dict]]
"""It gives figures, and what must hold."""

GROUPS: tuple[tuple[dict[str, Check], int], ...] = (
    (
        {
            "machine": limits.machine,
            "quantizers": numerics.quantizers,
            "integer products": numerics.integer_products,
            "decoding": generation.decoding,
            "layer": speed.layer,
            "loss": speed.loss,
            "caches": numerics.caches,
            "gptq": numerics.gptq_layer,
        },
        165,
    ),
    ({"zero3": training.zero3}, 70),
    (
        {
            "kernels": numerics.row_kernels,
            "product kernel": numerics.product_kernel,
            "norm and gate kernels": numerics.norm_and_gate_kernels,
            "compiled quantizers": numerics.compiled_quantizers,
        },
        105,
    ),
    ({"leaf modules": training.leaf_modules}, 55),
    ({"resume": training.resume}, 85),  # last: it makes its process deterministic
)
"""What is checked, and the seconds that are kept for it: 480 in all. What a group does not use, those behind it may.
Each group has a process of its own: what it leaves in memory, or breaks, is no other's; to start one takes up to 20
seconds where files are read for the first time."""

CHECKS = {name: check for checks, _ in GROUPS for name, check in checks.items()}


@dataclass(frozen=True)
class Gpu:
    """What is checked.

    Args:
        checks: which, with commas between; all by default
        seconds: no check goes on for longer than until then
        folder: where large files may lie for a while
        json: file for what was found
    """

    checks: str = ",".join(CHECKS)
    seconds: float = 480
    folder: Path = Path(tempfile.gettempdir())
    json: Path | None = None

    def __post_init__(self) -> None:
        if unknown := set(self.checks.split(",")) - set(CHECKS):
            raise UserError(f"checks={min(unknown)!r} is not possible: give {', '.join(CHECKS)}, with commas between.")


def main() -> int:
    (config,) = cli.parse(__doc__, Gpu)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started ends too
    began = time.monotonic()
    small = not torch.cuda.is_available()
    record: dict[str, Any] = {"machine": machine(), "torch": torch.__version__, "checks": {}}
    print(f"{machine()}, torch {torch.__version__}{': no GPU, small shapes' if small else ''}", flush=True)
    groups = ((CHECKS, 0),) if small else GROUPS  # what is small fits one process
    chosen = [([name for name in checks if name in config.checks.split(",")], kept) for checks, kept in groups]
    for place, (names, kept) in enumerate(chosen):
        left = config.seconds - (time.monotonic() - began)
        later = sum(others_kept for others, others_kept in chosen[place + 1 :] if others)
        most = max(min(kept, left), left - later)
        for name, result in _results(names, config.folder, None if small else most):
            record["checks"][name] = result
            print(f"{name}: {_line(result)}", flush=True)
            if config.json:
                config.json.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(config.json, json.dumps(record, indent=1) + "\n")
    return int(any("error" in result or not all(result["holds"].values()) for result in record["checks"].values()))


def _results(names: list[str], folder: Path, most: float | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """The results of checks that share a process, as they come; after ``most`` seconds it is ended."""
    if not names:
        return
    began, told = time.monotonic(), 0
    with tempfile.TemporaryDirectory(dir=folder) as place:
        report = Path(place) / "report.jsonl"
        report.touch()
        process = multiprocessing.get_context("spawn").Process(target=_work, args=(names, Path(place), report))
        process.start()
        try:
            while told < len(names):
                alive = process.is_alive()
                for name, result in read_lines(report)[told:]:
                    told += 1
                    yield name, result
                if most is not None and time.monotonic() - began > most:
                    _end(process)
                    alive = False
                if not alive and told < len(names) and not read_lines(report)[told:]:
                    why = f"its process ended with exit code {process.exitcode} after {time.monotonic() - began:.0f} s"
                    yield from ((name, {"seconds": 0, "error": why}) for name in names[told:])
                    break
                time.sleep(0.2)
        finally:
            _end(process)


def _end(process: BaseProcess) -> None:
    """End a group with its children, the compiler's workers and the converter of checkpoints: the next group is to have
    the machine for itself."""
    assert process.pid is not None
    with suppress(ProcessLookupError):  # it has no session yet, or all are gone
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()


def _work(names: list[str], folder: Path, report: Path) -> None:
    os.setsid()
    bench = Bench(Shapes() if torch.cuda.is_available() else SMALL, folder)
    for name in names:
        began = time.monotonic()
        try:
            figures, holds = CHECKS[name](bench)
            result: dict[str, Any] = {"holds": holds, "figures": figures}
        except Exception as error:
            traceback.print_exc()  # the record, which is published, has no paths of this machine
            result = {"error": f"{type(error).__name__}: {first_line(error)}"}
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        result = {"seconds": round(time.monotonic() - began, 1), **result}
        with report.open("a") as file:
            file.write(json.dumps([name, result], default=str) + "\n")


def _line(result: dict[str, Any]) -> str:
    if "error" in result:
        return f"FAILED after {result['seconds']} s: {result['error'][:300]}"
    broken = [name for name, holds in result["holds"].items() if not holds]
    verdict = f"NOT: {', '.join(broken)}" if broken else "ok"
    return f"{verdict} ({result['seconds']} s)  {_short(result['figures'])}"


def _short(figures: dict[str, Any]) -> str:
    return "  ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in figures.items()
        if not isinstance(value, dict | list) or (isinstance(value, list) and len(value) < 4)
    )


if __name__ == "__main__":
    cli.run(main)
