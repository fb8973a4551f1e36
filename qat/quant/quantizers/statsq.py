"""StatsQ: scale = 2 mean|x| / qmax; larger values are clipped (OFQ, arXiv 2302.02210, section 4.1).

The paper compares it with MinMax, for weights.
"""

from torch import Tensor

from qat.quant.quantizers.base import Grid, Quantizer, usable


class StatsQ(Quantizer):
    meaning = "scale from the mean magnitude, clips (the paper's comparison)"
    parts = ("weights",)
    clips = True
    is_exact = False

    def grid(self, rows: Tensor, qmax: int) -> Grid:
        return Grid(usable(rows.abs().float().mean(-1, keepdim=True) * (2 / qmax)))
