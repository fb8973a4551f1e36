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
"""Squared errors are whole numbers, in parts of the squared step of the whole range: these have the same sum in any
order, so that compiled code chooses as eager code does."""


class MSE(MinMaxAsymmetric):
    meaning = "with a zero point, the range clipped where that makes the squared error smaller"
    parts: ClassVar[tuple[str, ...]] = ("activations", "kv")
    clips = True

    def grid(self, rows: Tensor, qmax: int) -> Grid:
        low, high = self.ends(rows)
        scale, zero_point = whole = self.between(low, high, qmax)
        least = self._error(rows, *whole, whole[0], qmax)
        for share in SHARES[1:]:
            smaller = self.between(low * share, high * share, qmax)
            error = self._error(rows, *smaller, whole[0], qmax)
            scale, zero_point = (
                torch.where(error < least, new, old) for new, old in zip(smaller, (scale, zero_point), strict=True)
            )
            least = torch.minimum(error, least)
        return Grid(scale, zero_point)

    def _error(self, rows: Tensor, scale: Tensor, zero_point: Tensor, unit: Tensor, qmax: int) -> Tensor:
        """Compute the squared error [groups, 1] of rows [groups, n] on a grid, in ``_UNITS`` of ``unit`` squared."""
        codes = self.codes(rows, Grid(scale, zero_point), qmax)
        error = (codes - zero_point - rows.float() / scale) * (scale / unit)
        return (error * error * _UNITS).long().sum(-1, keepdim=True)
