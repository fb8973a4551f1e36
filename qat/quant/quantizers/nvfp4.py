"""NVFP4: e2m1 values in blocks of 16, whose scales are e4m3 numbers over one fp32 number of the tensor's.

    scale of a block = e4m3(max|x| / 6 * G) / G        0.125 / G where e4m3 rounds to 0

The rule of compressed-tensors and, but for blocks 2**-14 of the largest, of ModelOpt and torchao, which raise smaller
scales. "Four over six" (max|x| / 4 where that errs less) is ``nvfp4_4over6``.

G keeps e4m3 in its range and is fixed before training. Ours are powers of two: dividing by G, multiplying by 1 / G and
scaling the product by 1 / G, as engines variously do, are then the same, and every value is exact in bf16. It costs no
precision: 2688 / max|x|, the usual choice, fills e4m3's last power of two, and the 14 below it are as fine.
"""

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from qat.quant.quantizers.base import FloatFormat, Grid, divided
from qat.quant.quantizers.minifloat import E2M1, E2M1_MAX, E4M3, E4M3_MAX, E4M3_NORMAL, nearest_e4m3, power_of_two

_SMALLEST = 0.125
_HEADROOM = 1
"""By how many powers of two a tensor's values can grow before the scales of its blocks saturate."""


class NVFP4(E2M1):
    meaning = "4-bit floats, blocks of 16 with 8-bit scales, and a scale of the tensor"
    parts: ClassVar[tuple[str, ...]] = ("weights", "activations")
    clips = True
    group_size = 16
    scale_bytes = 1
    float_format: ClassVar[FloatFormat | None] = FloatFormat.NVFP4
    gguf_types: ClassVar[Mapping[int, str]] = {4: "NVFP4"}
    scales_tensors = True
    margin = 4.0

    def scale_of_tensor(self, largest: float) -> float:
        if not largest > 0:
            return 1.0
        return power_of_two(math.floor(math.log2(E4M3_MAX * E2M1_MAX / largest)) - _HEADROOM)

    def grid(self, rows: Tensor, qmax: int) -> Grid:
        return Grid(self.block_scale(rows, int(E2M1_MAX)))

    def block_scale(self, rows: Tensor, end: int) -> Tensor:
        """Return half the scale [groups, 1] with which each block's largest magnitude is ``end`` scales."""
        largest = rows.abs().amax(-1, keepdim=True).float()
        scale = nearest_e4m3(divided(largest, end) * self.tensor_scale)
        return torch.where(scale == 0, _SMALLEST, scale) / self.tensor_scale * 0.5

    def inside(self, rows: Tensor, grid: Grid, qmax: int) -> Tensor:
        """Values up to 7 scales, which an unbounded e2m1 would round to 6, count as inside: the scale follows the
        block's largest value up to rounding. Larger values occur only with a saturated or subnormal scale."""
        return rows.abs() <= grid.scale * 14

    def may_clip(self, grid: Grid) -> bool:
        least, most = (2 * scale.item() * self.tensor_scale.item() for scale in grid.scale.aminmax())
        return not (least >= E4M3_NORMAL and most < E4M3_MAX)  # True for NaN

    def scale_to_bits(self, scale: Tensor) -> Tensor:
        return nearest_e4m3(scale * 2 * self.tensor_scale).to(E4M3).view(torch.uint8)

    def scale_from_bits(self, bits: Tensor) -> Tensor:
        return bits.view(E4M3).float() / self.tensor_scale * 0.5
