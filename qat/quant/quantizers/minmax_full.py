"""MinMax, symmetric, with all 2^bits codes: scale = max|x| / (qmax + 0.5); codes in [-qmax-1, qmax].

The rule of torchao and of compressed-tensors (``calculate_qparams``). The largest element is half a step beyond the
last code, or half a step before the first: no element moves by more than that, and nothing counts as clipped.
"""

from typing import ClassVar

from torch import Tensor

from qat.quant.quantizers.base import Grid, Quantizer, divided, usable


class MinMaxFull(Quantizer):
    meaning = "symmetric, all codes (torchao's)"
    parts: ClassVar[tuple[str, ...]] = ("weights", "activations")
    full_range = True
    added_to_qmax: ClassVar[float | None] = 0.5

    def grid(self, rows: Tensor, qmax: int) -> Grid:
        largest = rows.abs().amax(-1, keepdim=True).float()
        return Grid(usable(divided(largest, 2 * qmax + 1) * 2))
