"""NVFP4 with four over six: each block's largest value becomes 6 scales or 4, whichever has the smaller squared error.

Between 4 and 6 e2m1 has no value, so that a block with values near 5/6 of its largest errs less where this is 4, and
its neighbour 3. The bytes are those of NVFP4, and every engine that reads these reads them. For weights: engines choose
the scales of activations themselves, by max|x| / 6.
"""

import torch
from torch import Tensor

from qat.quant.quantizers.base import Grid
from qat.quant.quantizers.nvfp4 import NVFP4


class NVFP4FourOverSix(NVFP4):
    meaning = "nvfp4 whose blocks end at 6 or at 4, by the smaller error"
    parts = ("weights",)
    is_exact = False

    def grid(self, rows: Tensor, qmax: int) -> Grid:
        grids = [Grid(self.block_scale(rows, end)) for end in (6, 4)]
        by_six, by_four = (self._error(rows, grid, qmax) for grid in grids)
        return Grid(torch.where(by_four < by_six, grids[1].scale, grids[0].scale))

    def _error(self, rows: Tensor, grid: Grid, qmax: int) -> Tensor:
        """Return the squared error of each block [groups, 1] on a grid, in squares of the tensor's own unit: in fp64,
        as squares of tiny values are no fp32 numbers."""
        values = self.codes(rows, grid, qmax) * grid.scale
        return (values.double() - rows.double()).square().sum(-1, keepdim=True)
