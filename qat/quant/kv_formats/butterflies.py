"""The Hadamard transform as engines compute it: with their order of additions."""

from typing import Any

import torch
from torch import Tensor


def butterflies(x: Tensor, size: int, factor: float = 1.0) -> Tensor:
    """Multiply each ``size`` consecutive elements of x [..., n] by ``factor`` and by Sylvester's matrix of ones and
    minus ones, in fp32, adding as engines add: first the factor, then butterflies at distance 1, 2, 4, and so on.

    qat.quant.hadamard adds in another order, and has other last bits.
    """
    return _Butterflies.apply(x, size, factor)


class _Butterflies(torch.autograd.Function):
    """The matrix is symmetric: the gradient passes through the same transform."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int, factor: float) -> Tensor:
        ctx.how, ctx.dtype = (size, factor), x.dtype
        return _add(x, size, factor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _add(grad, *ctx.how).to(ctx.dtype), None, None


def _add(x: Tensor, size: int, factor: float) -> Tensor:
    shape = x.shape
    x = x.float() if factor == 1 else x.float() * torch.tensor(factor, dtype=torch.float32)
    distance = 1
    while distance < size:
        first, second = x.reshape(-1, 2, distance).unbind(1)
        x = torch.stack([first + second, first - second], 1)
        distance *= 2
    return x.view(shape)
