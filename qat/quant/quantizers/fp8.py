"""FP8: e4m3 values, scale = max|x| / 448, at least 1 / (448 * 512).

vLLM's rule for activations, and compressed-tensors' for weights but for the least scale, which rows of zeros get too.
"""

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from qat.quant.quantizers.base import FloatFormat, Grid, Quantizer, divided
from qat.quant.quantizers.minifloat import E4M3, E4M3_MAX, nearest_e4m3


class FP8(Quantizer):
    meaning = "8-bit floats (e4m3)"
    allowed_bits = (8,)
    is_float = True
    code_dtype = E4M3
    float_format: ClassVar[FloatFormat | None] = FloatFormat.FP8
    gguf_types: ClassVar[Mapping[int, str]] = {}

    def grid(self, rows: Tensor, qmax: int) -> Grid:
        largest = rows.abs().amax(-1, keepdim=True).float()
        return Grid(divided(largest, int(E4M3_MAX)).clamp(min=1 / (E4M3_MAX * 512)))

    def codes(self, rows: Tensor, grid: Grid, qmax: int) -> Tensor:
        return nearest_e4m3(rows.float() / grid.scale)

    def from_bits(self, bits: Tensor) -> Tensor:
        return bits.view(E4M3)
