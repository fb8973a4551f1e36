"""vLLM's ``fp8`` cache without scales in the checkpoint: e4m3 numbers as they are (docs/features/quantization of vLLM).

All of its GPU backends that know FP8 store it; nothing is measured, and nothing looks at other tokens. Numbers beyond
448 are clipped, and below 2**-6 they are evenly spaced.
"""

import torch
from torch import Tensor

from qat.quant.kv_formats.vllm import VllmFormat
from qat.quant.quantizers.minifloat import E4M3, E4M3_MAX, nearest_e4m3


class VllmFp8Unscaled(VllmFormat):
    type = "fp8"
    bits = 8
    low, high = -E4M3_MAX, E4M3_MAX
    clips = True
    served = "FlashAttention 3 rounds queries to FP8 too, and CPUs cut off where training rounds"
    meaning = "vLLM's fp8 cache: e4m3, without scales"

    def codes(self, rows: Tensor) -> tuple[Tensor, ...]:
        return (torch.where(rows.abs() > self.high, rows, nearest_e4m3(rows)),)

    def numbers(self, codes: Tensor, *grid: Tensor) -> Tensor:
        return codes

    def pack(self, codes: Tensor, *grid: Tensor) -> Tensor:
        return codes.to(E4M3).view(torch.uint8)

    def unpack(self, packed: Tensor) -> tuple[Tensor, ...]:
        return (packed.contiguous().view(E4M3).float(),)
