"""All that only a GPU can show, by one command on one GPU: the same numbers as on a CPU, training that is that of plain
PyTorch, what quantization costs, and how near generation is to the machine's limits.

python benchmarks/gpu.py --json docs/gpu/NAME.json

It needs torch, transformers and the packages of docs/gpu/README.md. Each check stands for itself: one that fails is
reported, and the others go on. The file is written after every check. Without a GPU the same checks run small.
"""

import json
import signal
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

CHECKS: dict[str, tuple[Callable[[Bench], tuple[dict, dict]], int]] = {
    "machine": (limits.machine, 30),
    "quantizers": (numerics.quantizers, 120),
    "integer products": (numerics.integer_products, 45),
    "zero3": (training.zero3, 120),
    "resume": (training.resume, 120),
    "layer": (speed.layer, 90),
    "decoding": (generation.decoding, 90),
    "loss": (speed.loss, 45),
    "caches": (numerics.caches, 30),
    "gptq": (numerics.gptq_layer, 45),
    "leaf modules": (training.leaf_modules, 60),
}
"""What is checked, most valuable first, and the most seconds that it may take."""


@dataclass(frozen=True)
class Gpu:
    """What is checked.

    Args:
        checks: which, with commas between; all by default
        seconds: no check begins that could end later
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
    on_gpu = torch.cuda.is_available()
    bench = Bench(Shapes() if on_gpu else SMALL, config.folder)
    found: dict[str, Any] = {"machine": machine(), "torch": torch.__version__, "checks": {}}
    print(f"{machine()}, torch {torch.__version__}{'' if on_gpu else ': no GPU, small shapes'}", flush=True)
    signal.signal(signal.SIGALRM, _too_long)
    for name in config.checks.split(","):
        check, most = CHECKS[name]
        left = config.seconds - (time.monotonic() - began)
        result = {"left out": "no time"} if left < 5 else _run(check, bench, int(min(most, left)))
        found["checks"][name] = result
        print(f"{name}: {_line(result)}", flush=True)
        if config.json:
            config.json.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(config.json, json.dumps(found, indent=1, default=str) + "\n")
    return int(any(_failed(result) for result in found["checks"].values()))


def _run(check: Callable[[Bench], tuple[dict, dict]], bench: Bench, most: int) -> dict[str, Any]:
    began = time.monotonic()
    signal.alarm(most)
    try:
        figures, holds = check(bench)
        result: dict[str, Any] = {"holds": holds, "figures": figures}
    except Exception as error:
        result = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
    finally:
        signal.alarm(0)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return {"seconds": round(time.monotonic() - began, 1), **result}


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


def _too_long(*_: object) -> None:
    raise TimeoutError("it took longer than it may")


if __name__ == "__main__":
    cli.run(main)
