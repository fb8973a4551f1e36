"""MinMax, symmetric, with all 2^bits codes and a signed scale: the element of largest magnitude has the code -qmax-1.

    scale = m / (-qmax - 1),   m = the element of largest magnitude, with its sign; codes in [-qmax-1, qmax]

The rule of ggml's Q4_0 and Q5_0 (``quantize_row_q4_0_ref``), here for groups of any size and with the scale in fp32. If
two elements of both signs are the largest, m is the negative one (ggml: the first). Elements of the other sign that lie
more than half a step beyond the last code are clipped.
"""

import torch
from torch import Tensor

from qat.quant.quantizers.base import Grid, Quantizer, at_most_half_a_step, usable


class MinMaxSigned(Quantizer):
    meaning = "symmetric, all codes, the scale has a sign, may clip (ggml's)"
    parts = ("weights",)
    clips = True
    full_range = True

    def grid(self, rows: Tensor, qmax: int) -> Grid:
        low, high = rows.amin(-1, keepdim=True).float(), rows.amax(-1, keepdim=True).float()
        size = usable(torch.maximum(high, -low) / (qmax + 1))
        return Grid(torch.where(high > -low, -size, size))

    def inside(self, rows: Tensor, grid: Grid, qmax: int) -> Tensor:
        return at_most_half_a_step(rows, self.codes(rows, grid, qmax), grid, self.half_step)
