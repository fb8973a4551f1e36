"""MXFP4 (OCP MX v1.0): e2m1 values in blocks of 32, whose scale is a power of two, stored as its exponent (e8m0).

The exponent is floor(log2 max|x|) - 2, of a maximum that is first rounded up from 1.75 times a power of two: the rule
of compressed-tensors, and torchao's EVEN. It clips maxima of 6 to 7 times the scale to 6, an error no larger than that
of other values, so all gradients pass. Three other rules are in use:

    floor(log2 max|x|) - 2        ggml, OCP's example, torchao's FLOOR: clips up to 8 to 6
    ceil(log2(max|x| / 6))        ModelOpt, torchao's RCEIL: clips nothing
    ceil(log2 max|x|) - 2         torchao's CEIL: clips nothing, and leaves the largest code unused

All read each other's files. Every value is exact in bf16.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from qat.quant.quantizers.base import FloatFormat, Grid
from qat.quant.quantizers.minifloat import E2M1

_QUARTER = 1 << 21
"""A quarter of a power of two, in the last bits of an fp32 number: with it, 1.75 becomes the next power."""

_NAN = 255


class MXFP4(E2M1):
    meaning = "4-bit floats, blocks of 32 that share a power of two"
    group_size = 32
    scale_bytes = 1
    float_format: ClassVar[FloatFormat | None] = FloatFormat.MXFP4
    gguf_types: ClassVar[Mapping[int, str]] = {4: "MXFP4"}

    def grid(self, rows: Tensor, qmax: int) -> Grid:
        largest = rows.abs().amax(-1, keepdim=True).float()
        exponent = ((largest.view(torch.int32) + _QUARTER) >> 23) - 2
        return Grid(torch.where(largest.isfinite(), _half_of(exponent.clamp(min=0)), torch.nan))

    def scale_to_bits(self, scale: Tensor) -> Tensor:
        """Return the exponents of the blocks' scales, plus 127; 255 is NaN."""
        return torch.where(scale.isnan(), _NAN, torch.frexp(scale).exponent + 127).to(torch.uint8)

    def scale_from_bits(self, bits: Tensor) -> Tensor:
        return torch.where(bits == _NAN, torch.nan, _half_of(bits.int()))


def _half_of(exponent: Tensor) -> Tensor:
    """Return 2 ** (exponent - 128), fp32; the two smallest are denormal."""
    return torch.where(exponent < 2, _QUARTER << exponent, (exponent - 1) << 23).view(torch.float32)
