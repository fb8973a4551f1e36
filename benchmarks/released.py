"""The design of the code that was released with the LLM-QAT paper, in our own words: what the benchmarks compare with.

Fake quantization in three eager passes whose input is saved for a clipping backward that forward does not have; a
Linear that saves its dequantized weight; keys and values rounded where they are projected; a loss over whole logits.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from qat.quant.architecture import quantizable_linears


class ThreePassQuantizer(torch.autograd.Function):
    """Symmetric, one scale per row of the last dimension, in the dtype of x."""

    @staticmethod
    def forward(ctx, x: Tensor, bits: int) -> Tensor:
        ctx.save_for_backward(x)
        largest = x.abs().max(dim=-1, keepdim=True)[0].expand_as(x)
        factor = (2 ** (bits - 1) - 1) / (largest + 1e-6)
        return torch.round(x * factor).div(factor + 1e-6)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        grad = grad.clone()
        grad[x.ge(2.0)] = 0
        grad[x.le(-2.0)] = 0
        return grad, None


class ReleasedLinear(nn.Linear):
    """Quantizes weight and input on every call, in separate operations."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(ThreePassQuantizer.apply(x, 8), ThreePassQuantizer.apply(self.weight, 4), self.bias)


def prepare(model: PreTrainedModel) -> PreTrainedModel:
    """``model`` in 4-8-4, its class swapped layer by layer."""
    for name, module in quantizable_linears(model).items():
        module.__class__ = ReleasedLinear
        if name.endswith(("k_proj", "v_proj")):
            module.register_forward_hook(lambda layer, inputs, output: ThreePassQuantizer.apply(output, 4))
    return model


def loss(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Cross-entropy with the teacher's softmax, over whole logits [1, tokens, vocabulary]."""
    teacher = torch.softmax(teacher_logits.float(), -1)
    return -(teacher * torch.log_softmax(student_logits.float(), -1)).sum(-1).mean()
