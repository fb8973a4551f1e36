"""The number format: symmetric MinMax integers with one fp32 scale per group.

A group is always the last dimension of the tensor given here: a weight row (per channel), the
features of one token (per token), the ``head_dim`` of one token and KV head.

    qmax  = 2**(bits-1) - 1            narrow range: codes in [-qmax, qmax]
    scale = max|x| / qmax              fp32, whatever the dtype of x
    code  = round(x / scale)           half to even, in fp32
    x_hat = code * scale               rounded once, to the dtype of x

Nothing is clipped (LLM-QAT, arXiv 2305.17888, section 2.2: outliers carry the model), so the
straight-through gradient needs no mask. ``fake_quantize`` is ``dequantize(quantize(x))`` with that
gradient: training simulates exactly what the integer export stores.
"""

import torch
from torch import Tensor

FULL_PRECISION = 16
"""``bits=16`` means "not quantized" everywhere."""

_SMALLEST_SCALE = torch.finfo(torch.float32).tiny


def qmax(bits: int) -> int:
    """The largest code of the narrow symmetric range, 7 for 4 bits."""
    return 2 ** (bits - 1) - 1


def minmax_scale(x: Tensor, bits: int) -> Tensor:
    """One fp32 scale per group: [..., n] -> [..., 1].

    A group whose scale would be denormal (all zeros, above all) gets scale 1, hence zero codes: a
    denormal scale has too few bits left to keep the codes in range. NaN stays NaN.
    """
    scale = x.detach().abs().amax(-1, keepdim=True).float() / qmax(bits)
    return torch.where(scale < _SMALLEST_SCALE, 1.0, scale)


def quantize(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """x [..., n] -> int8 codes [..., n] and fp32 scale [..., 1]."""
    scale = minmax_scale(x, bits)
    return _codes(x, scale).to(torch.int8), scale


def dequantize(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Codes [..., n] and fp32 scale [..., 1] -> values [..., n] of ``dtype``."""
    return (codes * scale).to(dtype)


def round_to_grid(x: Tensor, bits: int) -> Tensor:
    """``dequantize(*quantize(x))`` without the integers in between, and without a gradient."""
    scale = minmax_scale(x, bits)
    return _codes(x, scale).mul_(scale).to(x.dtype)


def fake_quantize(x: Tensor, bits: int) -> Tensor:
    """x rounded to the grid of ``bits``, with the straight-through gradient; 16 returns x itself."""
    if bits == FULL_PRECISION:
        return x
    return _StraightThrough.apply(x, bits)


def _codes(x: Tensor, scale: Tensor) -> Tensor:
    return torch.div(x.detach(), scale).round_()


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, bits: int) -> Tensor:
        return round_to_grid(x, bits)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
