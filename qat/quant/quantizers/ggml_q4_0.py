"""ggml's Q4_0, the 4-bit block of llama.cpp: d = m / -8, codes in [-8, 7], the scale d stored in fp16.

m is the element of a block of 32 with the largest magnitude, with its sign: it gets the code -8, and the scale is
negative where m is positive. Codes are made with d as it was before it is rounded to fp16; elements of the other sign
beyond 7.5 |d| are clipped. The codes and scales are those of ``quantize_row_q4_0`` (ggml/src/ggml-quants.c), also where
fp16 cannot hold the scale: below 2^-25 it is stored as 0, hence zeros, and beyond 65504 as infinity, hence NaN.
"""

import torch
from torch import Tensor

from qat.quant.quantizers.base import Grid, Quantizer


class GgmlQ4_0(Quantizer):
    meaning = "llama.cpp's Q4_0: blocks of 32, fp16 scales, clips"
    parts = ("weights",)
    clips = True
    allowed_bits = (4,)
    group_size = 32
    scale_dtype = torch.float16
    grid_gives_codes = False
    full_range = True

    def grid(self, rows: Tensor, qmax: int) -> Grid:
        return Grid(_signed_extreme(rows.float()) / -(qmax + 1))

    def encode(self, rows: Tensor, qmax: int) -> tuple[Tensor, Grid]:
        scale = self.grid(rows, qmax).scale
        codes = torch.trunc(_shifted(rows, scale, qmax)).clamp(max=2 * qmax + 1)
        return codes - (qmax + 1), Grid(scale.half().float())

    def codes(self, rows: Tensor, grid: Grid, qmax: int) -> Tensor:
        """Compute the nearest codes on a grid that is given, as GPTQ gives it."""
        return torch.round(rows.float() / grid.scale).clamp_(-qmax - 1, qmax)

    def inside(self, rows: Tensor, grid: Grid, qmax: int) -> Tensor:
        """Return True where a value was not clipped; by its own scale, as ``grid`` has only the one in fp16."""
        return _shifted(rows, self.grid(rows, qmax).scale, qmax) < 2 * qmax + 2


def _signed_extreme(rows: Tensor) -> Tensor:
    """Return the element of largest magnitude [groups, 1] with its sign: of several the first, and of zeros 0."""
    largest = rows.abs().amax(-1, keepdim=True)
    nearness = torch.arange(rows.shape[-1], 0, -1, device=rows.device, dtype=torch.float32)
    above, below = (torch.where(rows == x, nearness, 0.0).amax(-1, keepdim=True) for x in (largest, -largest))
    return torch.where(above >= below, largest, -largest)  # a gather at argmax takes three times as long


def _shifted(rows: Tensor, scale: Tensor, qmax: int) -> Tensor:
    """Return what ggml cuts to integers: x / d + 8.5, by the inverse of d. That overflows where d is denormal, and what
    is not finite is cut to 0."""
    inverse = torch.where(scale == 0, 0.0, torch.ones_like(scale) / scale)
    shifted = rows.float() * inverse + (qmax + 1.5)
    return torch.where(shifted.isfinite(), shifted, 0.0)
