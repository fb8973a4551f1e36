"""LSQ: the scale is a learned step, one per tensor; larger values are clipped (arXiv 1902.08153).

The paper compares it with MinMax, for activations.
"""

from typing import Any

import torch
from torch import Tensor

from qat.quant.fused import fused
from qat.quant.quantizers.base import Grid, LearnedQuantizer, usable, values_of


class LSQ(LearnedQuantizer):
    meaning = "one learned step per layer, clips (the paper's comparison)"

    def initial(self, x: Tensor, qmax: int) -> Tensor:
        """Return 2 mean|x| / sqrt(qmax) (section 2.1 there)."""
        return (2 * x.float().abs().mean() / qmax**0.5).view(1)

    def fake_quantize(self, x: Tensor, parameter: Tensor, qmax: int) -> Tensor:
        return _LearnedStep.apply(x, parameter, self, qmax)


class _LearnedStep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, quantizer: LSQ, qmax: int) -> Tensor:
        ctx.save_for_backward(x, step)
        ctx.qmax = qmax
        rows = x.detach().reshape(-1, x.shape[-1])
        scale = usable(step.detach().float()).expand(len(rows), 1)
        return _round(rows, scale, quantizer, qmax).view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, step = ctx.saved_tensors
        rows = (grad.reshape(-1, x.shape[-1]), x.reshape(-1, x.shape[-1]))
        grad_x, slope = _gradients(*rows, usable(step.float()), ctx.qmax)
        # LSQ's gradient scale (section 2.2 there) keeps the step's updates as large as the weights'.
        grad_step = (slope.sum() / (x.numel() * ctx.qmax) ** 0.5).to(step.dtype).view(step.shape)
        return grad_x.view(x.shape), grad_step, None, None


@fused
def _round(rows: Tensor, scale: Tensor, quantizer: LSQ, qmax: int) -> Tensor:
    grid = Grid(scale)
    return values_of(quantizer.codes(rows, grid, qmax), grid, rows.dtype)


@fused
def _gradients(grad: Tensor, x: Tensor, step: Tensor, qmax: int) -> tuple[Tensor, Tensor]:
    """Compute the gradient of x, and the step's before it is summed: round(v) - v inside, the largest code outside."""
    scaled = x / step
    codes = torch.round(scaled).clamp(-qmax, qmax)
    passes = scaled.abs() <= qmax
    return torch.where(passes, grad, 0.0), grad.float() * torch.where(passes, codes - scaled, codes)
