"""What the machine can do at most, and which of torch's switches it has."""

import platform

import torch
import transformers

from gpu_checks.bench import Bench, device_seconds
from qat import fused


def machine(bench: Bench) -> tuple[dict, dict]:
    size, narrow = (8192, (1024, 4096, 11008)) if bench.device.type == "cuda" else (256, (32, 64, 96))
    x = torch.empty(2**30 if bench.device.type == "cuda" else 2**22, dtype=torch.uint8, device=bench.device)
    y = torch.empty_like(x)
    copy = 2 * x.nbytes / device_seconds(lambda: y.copy_(x))
    read = x.nbytes / device_seconds(lambda: x.view(torch.float32).sum())
    bench.limits |= {"copy": copy, "read": read}
    figures = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "division_option": [*fused.options()],
        "copy_TBps": copy / 1e12,
        "read_TBps": read / 1e12,
    }
    for name, (rows, inner, columns) in {"square": (size, size, size), "layer": narrow}.items():
        a = torch.randn(rows, inner, device=bench.device, dtype=bench.dtype)
        b = torch.randn(inner, columns, device=bench.device, dtype=bench.dtype)
        bench.limits[name] = 2 * rows * inner * columns / device_seconds(lambda: a @ b)  # noqa: B023
        figures[f"bf16_TFLOPs_{name}"] = bench.limits[name] / 1e12
    return figures, {"torch.compile works": fused.compiles(bench.device.type)}
