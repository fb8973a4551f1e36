"""NVFP4 with four over six: each block's largest value becomes 6 scales or 4, whichever has the smaller squared error.

Between 4 and 6 e2m1 has no value, so that a block with values near 5/6 of its largest errs less where this is 4, and
its neighbour 3. The bytes are those of NVFP4, and every engine that reads these reads them. For weights: engines choose
the scales of activations themselves, by max|x| / 6.
"""

import torch
from torch import Tensor

from qat.quant.quantizers.base import Grid
from qat.quant.quantizers.nvfp4 import NVFP4

_PART = 2.0**-20
"""Errors are counted in such parts of a scale: no block's squares reach 2**53, so that fp64 adds them exactly, and in
any order, as compiled code may. Where that does not hold, both scales are saturated, and the same."""


class NVFP4FourOverSix(NVFP4):
    meaning = "nvfp4 whose blocks end at 6 or at 4, by the smaller error"
    parts = ("weights",)

    def grid(self, rows: Tensor, qmax: int) -> Grid:
        by_six, by_four = (Grid(self.block_scale(rows, end)) for end in (6, 4))
        unit = by_six.scale.double() * _PART
        better = self._error(rows, by_four, unit, qmax) < self._error(rows, by_six, unit, qmax)
        return Grid(torch.where(better, by_four.scale, by_six.scale))

    def _error(self, rows: Tensor, grid: Grid, unit: Tensor, qmax: int) -> Tensor:
        """Return the squared error of each block [groups, 1] on a grid, in whole squares of ``unit``."""
        values = self.codes(rows, grid, qmax) * grid.scale
        return ((values.double() - rows.double()) / unit).square().round().sum(-1, keepdim=True)
