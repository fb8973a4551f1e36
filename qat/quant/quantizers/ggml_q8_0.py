"""ggml's Q8_0, the 8-bit block of llama.cpp: d = max|x| / 127 over 32 elements, stored in fp16; nothing is clipped.

llama.cpp rounds the inputs of a layer so, whose weights are Q4_0, Q5_0 or Q8_0. Codes are x * (127 / max|x|), half to
even, as its kernels for x86 make them (``quantize_row_q8_0``, ggml/src/ggml-cpu/arch/x86/quants.c); those for other
processors round about one code in 100,000 differently. Scales that fp16 cannot hold become 0 or infinity, as there.
"""

import torch
from torch import Tensor

from qat.quant.quantizers.base import Grid, Quantizer, divided


class GgmlQ8_0(Quantizer):
    meaning = "llama.cpp's Q8_0: blocks of 32, fp16 scales"
    parts = ("weights", "activations")
    allowed_bits = (8,)
    group_size = 32
    scale_dtype = torch.float16
    grid_gives_codes = False
    full_range = True
    rounds_as_llama_cpp = True

    def grid(self, rows: Tensor, qmax: int) -> Grid:
        return Grid(divided(_largest(rows), qmax))

    def encode(self, rows: Tensor, qmax: int) -> tuple[Tensor, Grid]:
        largest = _largest(rows)
        inverse = torch.where(largest == 0, 0.0, torch.full_like(largest, qmax) / largest)
        codes = torch.round(rows.float() * inverse)
        # Where the inverse overflows, the kernel stores the lowest byte; the scale is 0.
        codes = torch.where(codes.isfinite(), codes, -qmax - 1.0)
        return codes, Grid(divided(largest, qmax).half().float())


def _largest(rows: Tensor) -> Tensor:
    return rows.abs().amax(-1, keepdim=True).float()
