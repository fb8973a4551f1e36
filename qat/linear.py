"""QuantLinear: a Linear that keeps its Parameter and quantizes it, and its input, on the way.

The class of an existing ``nn.Linear`` is swapped (``QuantLinear.convert``), so names, Parameters and
state dicts stay what they were, and DeepSpeed ZeRO-3 partitions the layer like any other. No
dequantized weight outlives the call: backward quantizes the Parameter again, which ZeRO-3 has
gathered again anyway. What a layer saves is its input's int8 codes and scales.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from qat.quantizers import FULL_PRECISION, dequantize, quantize, round_to_grid


class QuantizedInput(NamedTuple):
    """An activation on its integer grid: codes int8 [..., n], scale fp32 [..., 1], values [..., n]."""

    codes: Tensor
    scale: Tensor
    values: Tensor


class InputQuantizer:
    """Per-token quantization of one activation, done once for all the layers that read it.

    q, k and v share one InputQuantizer, gate and up another. The result is kept until the last of
    them has read it, and only for the very values it came from.
    """

    def __init__(self, bits: int, readers: int):
        self.bits = bits
        self.readers = readers
        self._last: _LastInput | None = None

    def __call__(self, x: Tensor) -> QuantizedInput:
        last = self._last
        if last is None or not last.is_of(x):
            codes, scale = quantize(x, self.bits)
            result = QuantizedInput(codes, scale, dequantize(codes, scale, x.dtype))
            last = self._last = _LastInput(x.detach(), _version(x), result)
        last.reads += 1
        if last.reads == self.readers:
            self._last = None
        return last.result


@dataclass
class _LastInput:
    """What was quantized last. It is known by its memory, not by its tensor object: DeepSpeed's hooks give each
    layer a view of its own. Held here, the memory cannot become another tensor's meanwhile."""

    source: Tensor
    version: int
    result: QuantizedInput
    reads: int = 0

    def is_of(self, x: Tensor) -> bool:
        return (
            self.source.data_ptr() == x.data_ptr()
            and self.source.shape == x.shape
            and self.source.stride() == x.stride()
            and self.version == _version(x)
        )


def _version(x: Tensor) -> int:
    """Counts the in-place changes to x; inference tensors do not count them."""
    return 0 if x.is_inference() else x._version


class QuantLinear(nn.Linear):
    """``y = x_hat @ w_hat.T + bias``: x per token at ``a_bits``, w per output channel at ``w_bits``."""

    w_bits: int
    input_quantizer: InputQuantizer | None

    @classmethod
    def convert(cls, linear: nn.Linear, w_bits: int, input_quantizer: InputQuantizer | None) -> "QuantLinear":
        """Turn ``linear`` into a QuantLinear in place; None as ``input_quantizer`` leaves x as it is."""
        linear.__class__ = cls
        assert isinstance(linear, cls)
        linear.w_bits = w_bits
        linear.input_quantizer = input_quantizer
        return linear

    def forward(self, x: Tensor) -> Tensor:
        quantized = None if self.input_quantizer is None else self.input_quantizer(x)
        return _QuantLinear.apply(x, self.weight, self.bias, self.w_bits, quantized)

    @torch.no_grad()
    def freeze(self) -> None:
        """Put the quantized weight in the Parameter's place, so that evaluation quantizes it once."""
        self.weight.copy_(quantized_weight(self.weight, self.w_bits))
        self.w_bits = FULL_PRECISION

    def extra_repr(self) -> str:
        a_bits = FULL_PRECISION if self.input_quantizer is None else self.input_quantizer.bits
        return f"{super().extra_repr()}, w_bits={self.w_bits}, a_bits={a_bits}"


def quantized_weight(weight: Tensor, bits: int) -> Tensor:
    """The weight that the layer multiplies with, [out, in], no gradient."""
    return weight.detach() if bits == FULL_PRECISION else round_to_grid(weight, bits)


class _QuantLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, w_bits: int, quantized: QuantizedInput | None):
        ctx.w_bits = w_bits
        ctx.input_dtype = x.dtype
        ctx.input_quantized = quantized is not None
        if quantized is None:
            ctx.save_for_backward(weight, x)
        else:
            ctx.save_for_backward(weight, quantized.codes, quantized.scale)
            x = quantized.values
        y = x @ quantized_weight(weight, w_bits).t()
        return y if bias is None else y.add_(bias)

    @staticmethod
    def backward(ctx, grad: Tensor):
        weight, *saved = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        grad_x = grad @ quantized_weight(weight, ctx.w_bits) if needs_x else None
        rows = grad.flatten(0, -2)
        grad_weight = None
        if needs_weight:
            x = dequantize(saved[0], saved[1], ctx.input_dtype) if ctx.input_quantized else saved[0]
            grad_weight = rows.t() @ x.flatten(0, -2)
        grad_bias = rows.sum(0) if needs_bias else None
        return grad_x, grad_weight, grad_bias, None, None
