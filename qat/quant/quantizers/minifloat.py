"""Floating-point numbers of 4 and 8 bits (OCP MX v1.0, sections 5.3.1 and 5.3.3), rounded to in fp32.

Every operation is exact but for one ``torch.round``, to even: compiled code, eager code, CPUs and GPUs give the same
bits, on hardware that has these formats and on hardware that has not.

    e4m3   values up to 448, 3 bits of mantissa, normal from 2**-6
    e2m1   0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives; a code is twice the value, an int8
"""

import torch
from torch import Tensor

from qat.quant.quantizers.base import Grid, Quantizer

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
E4M3_NORMAL = 2.0**-6
E2M1_MAX = 6.0

_LARGEST_EXPONENT = 100
_EXPONENT = 0x7F800000
_TWICE_ONE = 2 * 0x3F800000
"""The exponents of a power of two and of its inverse add up to twice that of 1."""


def power_of_two(exponent: int) -> float:
    """Return 2 ** exponent, kept so far from fp32's limits that products with it and its inverse have room."""
    return 2.0 ** max(-_LARGEST_EXPONENT, min(exponent, _LARGEST_EXPONENT))


def nearest(x: Tensor, mantissa: int, normal: float, largest: float) -> Tensor:
    """Round fp32 x [...] to the nearest number with ``mantissa`` bits after the first one; halves to even, and what is
    too large to the largest. Below ``normal``, the smallest normal number, they are evenly spaced. NaN stays NaN."""
    power = (x.view(torch.int32) & _EXPONENT).view(torch.float32)  # 2**floor(log2|x|)
    step = power.clamp(min=normal) * 2.0**-mantissa
    steps = (_TWICE_ONE - step.view(torch.int32)).clamp(min=0).view(torch.float32)  # 1 / step, as it is a power of two
    return (torch.round(x * steps) * step).clamp(-largest, largest)


def nearest_e4m3(x: Tensor) -> Tensor:
    """Round fp32 x [...] to e4m3, as fp32."""
    return nearest(x, 3, E4M3_NORMAL, E4M3_MAX)


class E2M1(Quantizer):
    """The base of formats of e2m1 codes: a subclass defines their blocks and the scale of a block. The grid's scale is
    half the block's, as codes are twice the values. Their bits, in order, are 0, 1, 2, 3, 4, 6, 8, 12, then the
    negatives. There is one zero: -0 of other software is read as 0."""

    allowed_bits = (4,)
    is_float = True

    def codes(self, rows: Tensor, grid: Grid, qmax: int) -> Tensor:
        return nearest(rows.float() / grid.scale, 1, 2.0, 2 * E2M1_MAX)

    def to_bits(self, codes: Tensor) -> Tensor:
        size = codes.abs()
        number = size - (size > 4).to(torch.int8) - (size > 6).to(torch.int8) - 3 * (size > 8).to(torch.int8)
        return number | (codes < 0).to(torch.int8) << 3

    def from_bits(self, bits: Tensor) -> Tensor:
        number = bits & 7
        size = torch.where(number < 4, number, (4 + 2 * (number & 1)) << (number >> 1) - 2)
        return torch.where(bits & 8 == 0, size, -size)
