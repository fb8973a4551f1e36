"""Per group, the share of the asymmetric MinMax range with the least squared error; values beyond it are clipped.

For 4-bit activations after a rotation: their values are close to normally distributed, so that the few largest ones
cost all others half a bit. (Without a rotation outliers carry the model, and MinMax is better.)
"""

from typing import ClassVar

import torch
from torch import Tensor

from qat.quant.quantizers.base import Grid
from qat.quant.quantizers.minmax_asymmetric import MinMaxAsymmetric

SHARES = (1.0, 0.9, 0.8, 0.7, 0.6)

_UNITS = 2.0**16
"""Squared errors are counted in whole units, of the squared step of the whole range over this: whole numbers have the
same sum in any order, so that compiled code chooses as eager code does."""


class MSE(MinMaxAsymmetric):
    meaning = "with a zero point, the range clipped where that makes the squared error smaller"
    parts: ClassVar[tuple[str, ...]] = ("activations", "kv")
    clips = True

    def grid(self, rows: Tensor, qmax: int) -> Grid:
        low, high = self.ends(rows)
        whole = best = self.between(low, high, qmax)
        least = self._error(rows, whole, whole, qmax)
        for share in SHARES[1:]:
            grid = self.between(low * share, high * share, qmax)
            error = self._error(rows, grid, whole, qmax)
            better, least = error < least, torch.minimum(error, least)
            best = Grid(*(torch.where(better, new, old) for new, old in zip(grid, best, strict=True)))
        return best

    def _error(self, rows: Tensor, grid: Grid, whole: Grid, qmax: int) -> Tensor:
        """Compute the squared error [groups, 1] of rows [groups, n] on ``grid``, in units of that of ``whole``."""
        codes = self.codes(rows, grid, qmax)
        error = (codes - grid.zero_point - rows.float() / grid.scale) * (grid.scale / whole.scale)
        return (error * error * _UNITS).long().sum(-1, keepdim=True)
