"""MinMax, asymmetric: scale = (max - min) / (2 qmax + 1) over the range that holds 0; codes in [-qmax-1, qmax]."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from qat.quant.quantizers.base import Grid, Quantizer, divided, usable


class MinMaxAsymmetric(Quantizer):
    meaning = "with a zero point, no clipping"
    symmetric = False
    gguf_types: ClassVar[Mapping[int, str]] = dict.fromkeys((2, 3, 4), "Q4_1")

    def grid(self, rows: Tensor, qmax: int) -> Grid:
        return Grid(*self.between(*self.ends(rows), qmax))

    def ends(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the ends [groups, 1], fp32, of the smallest range that holds rows [groups, n] and 0."""
        return rows.amin(-1, keepdim=True).float().clamp(max=0), rows.amax(-1, keepdim=True).float().clamp(min=0)

    def between(self, low: Tensor, high: Tensor, qmax: int) -> tuple[Tensor, Tensor]:
        """Return the scale and the zero point [groups, 1] with which the codes lie between two ends."""
        levels = 2 * qmax + 1
        scale = usable(divided(high, levels) - divided(low, levels))
        return scale, torch.round(-low / scale) - (qmax + 1)
