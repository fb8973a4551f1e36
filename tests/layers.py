"""A small quantized layer, and equality of tensors."""

import torch
from torch import nn

from qat.quant.linear import InputQuantizer, QuantLinear
from qat.quant.number_format import Format

FULL, W4, A8 = Format(16), Format(4), Format(8)


def make(weight=W4, inputs=A8, bias=True, readers=1):
    """A QuantLinear of 48 inputs and 24 outputs."""
    torch.manual_seed(0)
    shared = InputQuantizer(inputs, readers) if inputs.quantizes else None
    return QuantLinear.convert(nn.Linear(48, 24, bias=bias), weight, inputs, shared)


def same(a, b):
    """Assert that all values and NaNs are equal."""
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
