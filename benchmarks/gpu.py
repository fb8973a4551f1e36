"""All that only a GPU can show, by one command on one GPU: the same numbers as on a CPU, training that is that of plain
PyTorch, what quantization costs, and how near generation is to the machine's limits.

python benchmarks/gpu.py --json docs/gpu/NAME.json

It needs torch, transformers and the packages of docs/gpu/README.md. Each check stands for itself: one that fails is
reported, and the others go on. The file is written after every check. Without a GPU the same checks run small.
"""

import json
import multiprocessing
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gpu_checks import generation, limits, numerics, speed, training
from gpu_checks.bench import SMALL, Bench, Shapes

from launch import cli
from qat.errors import UserError
from qat.files import write_atomically
from qat.machine import machine

Check = Callable[[Bench], tuple[dict, dict]]
"""It gives figures, and what must hold."""

CHECKS: dict[str, tuple[Check, int]] = {
    "machine": (limits.machine, 30),
    "integer products": (numerics.integer_products, 30),
    "zero3": (training.zero3, 75),
    "resume": (training.resume, 100),
    "quantizers": (numerics.quantizers, 90),
    "decoding": (generation.decoding, 75),
    "layer": (speed.layer, 40),
    "loss": (speed.loss, 30),
    "caches": (numerics.caches, 30),
    "gptq": (numerics.gptq_layer, 30),
    "leaf modules": (training.leaf_modules, 75),
}
"""What is checked, most valuable first, and the most seconds that it may take, the start of its process included."""


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
    began = time.monotonic()
    small = not torch.cuda.is_available()
    found: dict[str, Any] = {"machine": machine(), "torch": torch.__version__, "checks": {}}
    print(f"{machine()}, torch {torch.__version__}{': no GPU, small shapes' if small else ''}", flush=True)
    for name in config.checks.split(","):
        left = config.seconds - (time.monotonic() - began)
        most = None if small else min(CHECKS[name][1], left)  # the time of GPUs is short
        result = {"left out": "no time"} if most is not None and most < 5 else _run(name, config.folder, most)
        found["checks"][name] = result
        print(f"{name}: {_line(result)}", flush=True)
        if config.json:
            config.json.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(config.json, json.dumps(found, indent=1) + "\n")
    return int(any(_failed(result) for result in found["checks"].values()))


def _run(name: str, folder: Path, most: float | None) -> dict[str, Any]:
    """A check in a process of its own: what it leaves in memory, or breaks, is no other's."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(dir=folder) as place:
        report = Path(place) / "report.json"
        process = multiprocessing.get_context("spawn").Process(target=_work, args=(name, Path(place), report))
        process.start()
        process.join(most)
        if process.is_alive():
            process.kill()
            process.join()
            result = {"error": f"it took longer than {most:.0f} s"}
        elif report.exists():
            result = json.loads(report.read_text())
        else:
            result = {"error": f"its process ended with exit code {process.exitcode}"}
    return {"seconds": round(time.monotonic() - began, 1), **result}


def _work(name: str, folder: Path, report: Path) -> None:
    check, _ = CHECKS[name]
    bench = Bench(SMALL if not torch.cuda.is_available() else Shapes(), folder)
    try:
        figures, holds = check(bench)
        result: dict[str, Any] = {"holds": holds, "figures": figures}
    except Exception as error:
        result = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
    report.write_text(json.dumps(result, default=str))


def _line(result: dict[str, Any]) -> str:
    if "error" in result:
        return f"FAILED after {result['seconds']} s: {result['error'].splitlines()[0][:300]}"
    if "left out" in result:
        return "left out: no time"
    broken = [name for name, holds in result["holds"].items() if not holds]
    verdict = f"NOT: {', '.join(broken)}" if broken else "ok"
    return f"{verdict} ({result['seconds']} s)  {_short(result['figures'])}"


def _short(figures: dict[str, Any]) -> str:
    return "  ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in figures.items()
        if not isinstance(value, dict | list) or (isinstance(value, list) and len(value) < 4)
    )


def _failed(result: dict[str, Any]) -> bool:
    return "error" in result or not all(result.get("holds", {}).values())


if __name__ == "__main__":
    cli.run(main)
