"""What the machine can do at most, and which of torch's switches it has."""

import os
import platform

import torch
import transformers

from gpu_checks.bench import Bench, device_seconds, product_rate, read_rate
from qat.quant import fused


def machine(bench: Bench) -> tuple[dict, dict]:
    on_gpu = bench.device.type == "cuda"
    x = torch.empty(2**30 if on_gpu else 2**22, dtype=torch.uint8, device=bench.device)
    y = torch.empty_like(x)
    square, layer = ((8192,) * 3, (1024, 4096, 11008)) if on_gpu else ((256,) * 3, (32, 64, 96))
    figures = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "division_option": [*fused.options()],
        "copy_TBps": 2 * x.nbytes / device_seconds(lambda: y.copy_(x)) / 1e12,
        "read_TBps": read_rate(bench) / 1e12,
        "bf16_TFLOPs_square": product_rate(bench, *square) / 1e12,
        "bf16_TFLOPs_layer": product_rate(bench, *layer) / 1e12,
    }
    switched_off = os.environ.get("TORCHDYNAMO_DISABLE") == "1"
    return figures, {"torch.compile works": switched_off or fused.compiles(bench.device.type)}
