"""Ternary: codes -1, 0 and 1, scale = max|x| / 1.5, so that the three levels share the range evenly (ParetoQ, arXiv
2502.02631, section 3.2). Stored in 2 bits. ``minmax`` with 2 bits has the same codes, and 0 for half of the range.
"""

from qat.quant.quantizers.minmax_full import MinMaxFull


class Ternary(MinMaxFull):
    meaning = "three levels that share the range evenly, in 2 bits (ParetoQ's)"
    parts = ("weights",)
    allowed_bits = (2,)
    full_range = False
