"""SEQ, stretched elastic quantization: 2 bits as four levels at half steps, symmetric and without a 0 (ParetoQ, arXiv
2502.02631, section 3.2).

    x_hat = max|x| * (-3/4, -1/4, 1/4 or 3/4), whichever is nearest

Codes are the odd numbers from -3 to 3, so that the grid has no zero point, and scale = max|x| / 4. ParetoQ learns the
scale from there (``train=all``).
"""

import torch
from torch import Tensor

from qat.quant.quantizers.base import SMALLEST_SCALE, Grid, Quantizer, stored

_SMALLEST_FLOAT16 = 2.0**-24


class SEQ(Quantizer):
    meaning = "2 bits, four levels at half steps, no 0 (ParetoQ's)"
    parts = ("weights",)
    allowed_bits = (2,)
    half_step = 1.0

    def code_range(self, qmax: int) -> tuple[int, int]:
        return -2 * qmax - 1, 2 * qmax + 1

    def grid(self, rows: Tensor, qmax: int) -> Grid:
        """Return the grid; that of zeros gives numbers that are smaller than any usual one."""
        scale = rows.abs().amax(-1, keepdim=True).float() / (2 * qmax + 2)
        return Grid(torch.where(scale < SMALLEST_SCALE, SMALLEST_SCALE, scale))

    def stored_grid(self, rows: Tensor, qmax: int) -> Grid:
        """Return the grid with the scale as it is stored: as there is no code 0, one that would become 0 is small."""
        return Grid(stored(self.grid(rows, qmax).scale, self.scale_dtype, _SMALLEST_FLOAT16))

    def codes(self, rows: Tensor, grid: Grid, qmax: int) -> Tensor:
        steps = rows.float() / (2 * grid.scale)
        return (2 * torch.round(steps - 0.5) + 1).clamp_(*self.code_range(qmax))
