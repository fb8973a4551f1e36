"""MinMax, symmetric: scale = max|x| / qmax; codes in [-qmax, qmax].

Nothing is clipped: outliers carry the model (LLM-QAT, arXiv 2305.17888, section 2.2). The default, and the paper's
choice.
"""

from torch import Tensor

from qat.quant.quantizers.base import Grid, Quantizer, divided, usable


class MinMax(Quantizer):
    meaning = "symmetric, no clipping (the paper's)"
    added_to_qmax = 0.0

    def grid(self, rows: Tensor, qmax: int) -> Grid:
        return Grid(usable(divided(rows.abs().amax(-1, keepdim=True).float(), qmax)))
