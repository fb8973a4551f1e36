"""FP8 with one scale per tensor: e4m3 values, and a scale that is measured before training and stays.

The static form of engines, which read it beside the weights and look at no activation while they serve: the cheapest
for them. What outgrows the scale is clipped, and gets no gradient. Scales are powers of two: dividing by the scale and
multiplying by its inverse, as engines variously do, are then the same, and every value is exact in bf16. It costs no
precision but that of values below 2**-14 of the largest, which have fewer bits.
"""

import math

import torch
from torch import Tensor

from qat.quant.quantizers.base import FloatFormat, Grid
from qat.quant.quantizers.fp8 import FP8
from qat.quant.quantizers.minifloat import E4M3_MAX, power_of_two


class FP8Tensor(FP8):
    meaning = "8-bit floats (e4m3) with one scale per tensor, measured before training"
    parts = ("weights", "activations")
    clips = True
    float_format = FloatFormat.FP8_TENSOR
    scales_tensors = True
    margin = 2.0

    def scale_of_tensor(self, largest: float) -> float:
        if not largest > 0:
            return 1.0
        return power_of_two(math.ceil(math.log2(largest / E4M3_MAX)))

    def grid(self, rows: Tensor, qmax: int) -> Grid:
        return Grid(torch.zeros_like(rows[:, :1], dtype=torch.float32) + self.tensor_scale)

    def inside(self, rows: Tensor, grid: Grid, qmax: int) -> Tensor:
        return rows.abs() <= grid.scale * E4M3_MAX
