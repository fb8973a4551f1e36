"""QuantLinear: a Linear that keeps its Parameter and quantizes it, and its input, in each call.

The class of an existing ``nn.Linear`` is swapped (``QuantLinear.convert``), so names, Parameters and state dicts stay
what they were, and DeepSpeed ZeRO-3 partitions the layer like any other. No dequantized weight outlives the call:
backward quantizes the Parameter again, on the grid that forward found, which ZeRO-3 has gathered again anyway. Where
ZeRO-3 gathers codes instead of values (qat.train.code_gather), these are the weight. A layer saves only its input's
int8 codes, and scales.

Where the formats allow it (``multiplies_codes``) forward multiplies the codes and scales their sum, with the same
result in training, evaluation and serving. Where both are integers and the input's have a scale per block, as in
llama.cpp, it multiplies their exact values, in fp32 (``multiplies_blocks``); elsewhere the values in the dtype of the
input.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qat.quant.config import QuantConfig
from qat.quant.number_format import (
    Format,
    Quantized,
    dequantize,
    inside,
    learned_gradients,
    may_clip,
    passed,
    quantize,
    round_to_grid,
)
from qat.quant.packing import stand_in, stand_in_values
from qat.quant.products import block_dtype, matmul, matmul_blocks, matmul_codes
from qat.quant.quantizers.base import Grid, divided

ARITHMETIC = "products of codes"
"""The arithmetic of quantized models. It is recorded with runs and results, and changes whenever the same settings
would give other numbers, but for the order of sums in floats, which depends on the device and its kernels too."""

WITH_ZERO_POINTS = "products of codes less zero points"
"""The arithmetic of models whose integer matmuls have zero points. Earlier versions multiplied floats there, and
recorded it as ARITHMETIC."""


class InputQuantizer:
    """Quantization of one activation, per token or in blocks of it, done once for all the layers that read it.

    q, k and v share one InputQuantizer, gate and up another. The result is kept until the last of
    them has read it, and only for the very values it came from.
    """

    def __init__(self, form: Format, readers: int):
        self.form = form
        self.readers = readers
        self._last: _LastInput | None = None

    def offer(self, x: Tensor, quantized: Quantized) -> None:
        """Take the codes of x from what computed it: its readers then need not make them."""
        self._last = _LastInput(x.detach(), _changes(x), SharedInput(quantized))

    def __call__(self, x: Tensor) -> "SharedInput":
        last = self._last
        if last is None or not last.is_of(x):
            last = self._last = _LastInput(x.detach(), _changes(x), SharedInput(quantize(x, self.form)))
        last.reads += 1
        if last.reads == self.readers:
            self._last = None
        return last.result


class SharedInput:
    """A quantized activation [..., n], and its values for layers that multiply in floats."""

    def __init__(self, quantized: Quantized):
        self.quantized = quantized
        self._values: dict[torch.dtype, Tensor] = {}
        self._passes: Tensor | None = None

    def values(self, dtype: torch.dtype) -> Tensor:
        """Return the values [..., n] in ``dtype``, computed once."""
        if dtype not in self._values:
            self._values[dtype] = dequantize(self.quantized, dtype)
        return self._values[dtype]

    def passes(self, x: Tensor, form: Format) -> Tensor | None:
        """Return where x, of which this is made by ``form``, is not clipped, bool [..., n], computed once; None if
        nothing is clipped."""
        if self._passes is None and may_clip(form, self.quantized.grid):
            self._passes = inside(x, form, self.quantized.grid)
        return self._passes


@dataclass
class _LastInput:
    """The most recent result. It is identified by its input's memory, not by the tensor object: DeepSpeed's hooks give
    each layer a view of its own. Holding the input here keeps its memory from being reused for another tensor."""

    source: Tensor
    version: int
    result: SharedInput
    reads: int = 0

    def is_of(self, x: Tensor) -> bool:
        return (
            self.source.data_ptr() == x.data_ptr()
            and self.source.shape == x.shape
            and self.source.stride() == x.stride()
            and self.version == _changes(x)
        )


def _changes(x: Tensor) -> int:
    """Return the count of in-place changes to x; inference tensors have none."""
    return 0 if x.is_inference() else x._version


class QuantLinear(nn.Linear):
    """``y = x_hat @ w_hat.T + bias``: x [..., in] on the grid of its tokens, w [out, in] on that of its channels.

    Attributes:
        weight_format: how the weight is quantized
        input_quantizer: quantizes x; None where x stays as it is, or has a learned step
        input_format: how x is quantized
        input_step: the Parameter of a learned quantizer, [size]; None for the other ones
        scale_change: the Parameter of a learned weight scale, [out, groups]; None where the weight's values give it
        start_as_int32: the grid with which it began, as integers for the reason below: [1 or 2, out, groups]
        keeps_codes: whether the codes stay those of the grid with which it began: the scale alone learns
        frozen: whether the Parameter holds values that are on their grid already, and stay there
        codes, grid_as_int32: the frozen weight's codes [out, in] and fp32 grid [1 or 2, out, groups], where the layer
            multiplies codes or blocks. The grid's bits are kept as integers: what casts a model to bf16 leaves them
            alone
    """

    weight_format: Format
    input_format: Format
    input_quantizer: InputQuantizer | None
    input_step: nn.Parameter | None
    scale_change: nn.Parameter | None
    start_as_int32: Tensor | None
    keeps_codes: bool
    frozen: bool
    codes: Tensor | None
    grid_as_int32: Tensor | None

    @classmethod
    def convert(cls, linear: nn.Linear, weight: Format, inputs: Format, shared: InputQuantizer | None) -> "QuantLinear":
        """Turn ``linear`` into a QuantLinear in place; ``shared`` quantizes its input together with that of its
        siblings."""
        linear.__class__ = cls
        assert isinstance(linear, cls)
        linear.weight_format, linear.input_format = weight, inputs
        linear.input_quantizer = shared
        linear.thaw()
        step = None
        if learned := inputs.learned:  # in the weights' dtype: DeepSpeed wants one; NaN until it is initialised
            step = nn.Parameter(torch.full((learned.size,), torch.nan, dtype=linear.weight.dtype))
        linear.register_parameter("input_step", step)
        linear.register_parameter("scale_change", None)
        linear.register_buffer("start_as_int32", None, persistent=False)
        linear.keeps_codes = False
        return linear

    def forward(self, x: Tensor) -> Tensor:
        x, shared = self.quantize_input(x)
        return _QuantLinear.apply(x, self.weight, self.bias, self.scale_change, self, shared)

    def quantize_input(self, x: Tensor) -> tuple[Tensor, "SharedInput | None"]:
        """Return x [..., in] rounded by a learned quantizer, or x and its codes, or x unchanged."""
        learned = self.input_format.learned
        if learned is not None and self.input_step is not None:
            x = learned.fake_quantize(x, self.input_step, self.input_format.qmax)
        return x, None if self.input_quantizer is None else self.input_quantizer(x)

    @property
    def multiplies_codes(self) -> bool:
        """Return whether forward multiplies codes: weight and input are integers with one scale per row, so that the
        scales can be factored out of the sum."""
        return can_multiply_codes(self.weight_format, self.input_format)

    @property
    def multiplies_blocks(self) -> bool:
        """Return whether forward multiplies exact values: weight and input are integers without zero points, and a
        token has a scale for each of its blocks. An engine adds up each block's products of codes and scales that sum,
        in fp32; the sum of the values' products in fp32 differs from it by the order of its terms alone."""
        return can_multiply_blocks(self.weight_format, self.input_format)

    def learn_scale(self, start: Grid) -> None:
        """Make the scale of the weight's grid a Parameter, which begins with ``start``; its zero point stays.

            scale = start + change / (highest code)

        The Parameter is the change of the largest value that is not clipped. LSQ scales the gradient of the scale, so
        that its updates are as large beside it as the weights' are beside them; AdamW undoes any such factor, and
        its steps of one learning rate are too large for the scale itself, by as much as the bits are more. For the
        change they are of the right size with any bits; and 0, where it begins, is exact in bf16 too.
        """
        self.scale_change = nn.Parameter(torch.zeros_like(start.scale, dtype=self.weight.dtype))
        self.register_buffer("start_as_int32", _as_int32(start), persistent=False)

    def learned_grid(self, change: Tensor | None = None) -> Grid | None:
        """Return the weight's learned grid [out, groups], by another ``change`` of that shape if one is given; None
        where its values give it."""
        change = self.scale_change if change is None else change
        if change is None:
            return None
        start, zero_point = self._start(change.device)
        scale = start + divided(change.detach().float(), self.weight_format.code_range[1])
        return Grid(torch.where(scale == 0, start, scale), zero_point)

    def _start(self, device: torch.device) -> Grid:
        assert self.start_as_int32 is not None
        return Grid(*self.start_as_int32.to(device).view(torch.float32))

    def quantized(self, weight: Tensor, grid: Grid | None) -> Quantized:
        """Quantize ``weight`` [out, in] on ``grid`` [out, groups], or on that of its values; or return the codes that
        stand in for them."""
        if (codes := stand_in(self.weight, self.weight_format)) is not None:
            return codes
        if not self.keeps_codes or grid is None:
            return quantize(weight, self.weight_format, grid)
        return Quantized(quantize(weight, self.weight_format, self._start(weight.device)).codes, grid)

    def rounded(self, weight: Tensor, grid: Grid | None) -> tuple[Tensor, Grid]:
        """Return the values [out, in] of ``quantized``, of the weight's dtype, and their grid [out, groups]; of codes
        that stand in for them, which pass all gradients, no grid."""
        if (values := stand_in_values(self.weight, self.weight_format, weight.dtype)) is not None:
            return values, Grid(None, None)  # type: ignore[arg-type]
        if not self.keeps_codes or grid is None:
            return round_to_grid(weight, self.weight_format, grid)
        return dequantize(self.quantized(weight, grid), weight.dtype), grid

    def gradients(self, grad: Tensor, weight: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """Return the gradients of the weight [out, in] and of ``scale_change`` [out, groups], given that of the rounded
        weight, which is on ``grid``. Codes that stay make the values a product with the scale, whose gradient is exact,
        and nothing passes to the weight."""
        if self.keeps_codes:
            codes = self.quantized(weight, Grid(torch.ones_like(grid.scale), grid.zero_point))
            slopes = grad.float() * dequantize(codes, torch.float32)
            of_weight, of_scale = grad, slopes.unflatten(-1, (grid.scale.shape[-1], -1)).sum(-1)
        else:
            of_weight, of_scale = learned_gradients(grad, weight, self.weight_format, grid)
        assert self.scale_change is not None
        return of_weight, divided(of_scale, self.weight_format.code_range[1]).to(self.scale_change.dtype)

    @torch.no_grad()
    def freeze(self, grid: Grid | None = None) -> Quantized | None:
        """Quantize the weight permanently, for evaluation; on ``grid``, or its own. Return it, if it is quantized."""
        if not self.weight_format.quantizes:
            return None
        quantized = self.quantized(self.weight, self.learned_grid() if grid is None else grid)
        self.weight.copy_(dequantize(quantized, self.weight.dtype))
        self.hold(quantized)
        return quantized

    def hold(self, weight: Quantized) -> None:
        """Use these integers as the weight from now on; the Parameter has their values."""
        self.frozen = True
        if self.multiplies_codes or self.multiplies_blocks:
            self.codes, self.grid_as_int32 = weight.codes, _as_int32(weight.grid)

    def thaw(self) -> None:
        """Quantize the Parameter at each call, as in training."""
        self.frozen = False
        for buffer in ("codes", "grid_as_int32"):
            self.register_buffer(buffer, None, persistent=False)

    def integers(self) -> Quantized:
        """Return the weight as integers; only for a layer that multiplies codes or blocks."""
        if self.codes is not None and self.grid_as_int32 is not None:
            return Quantized(self.codes, Grid(*self.grid_as_int32.view(torch.float32)))
        return self.quantized(self.weight, self.learned_grid())

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, weight={self.weight_format}, input={self.input_format}"


def can_multiply_codes(weight: Format, inputs: Format) -> bool:
    """Return whether a layer with these formats multiplies codes; see ``QuantLinear.multiplies_codes``."""
    if not weight.quantizes or not inputs.quantizes:
        return False
    whole_rows = weight.group_size == 0 and inputs.group_size == 0
    integers = not weight.by.is_float and not inputs.by.is_float
    return whole_rows and integers and not inputs.learned


def arithmetic_of(quant: QuantConfig) -> str:
    """Return the arithmetic of a model with these settings: ARITHMETIC, or WITH_ZERO_POINTS."""
    for own in quant.all_settings():
        has_zero_points = not (own.weights.symmetric and own.activations.symmetric)
        if has_zero_points and can_multiply_codes(own.weights, own.activations):
            return WITH_ZERO_POINTS
    return ARITHMETIC


def _as_int32(grid: Grid) -> Tensor:
    """Return the grid's parts as int32 [1 or 2, ...]."""
    return torch.stack([part for part in grid if part is not None]).view(torch.int32)


def can_multiply_blocks(weight: Format, inputs: Format) -> bool:
    """Return whether a layer with these formats multiplies blocks; see ``QuantLinear.multiplies_blocks``."""
    integers = all(form.quantizes and form.symmetric and not form.by.is_float for form in (weight, inputs))
    return integers and inputs.group_size > 0


class _QuantLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        change: Tensor | None,
        layer: QuantLinear,
        shared: SharedInput | None,
    ) -> Tensor:
        grid = Grid(None, None)  # type: ignore[arg-type]
        if shared is not None and layer.multiplies_codes:
            quantized = layer.integers()
            grid = quantized.grid
            y = matmul_codes(shared.quantized, quantized, layer.weight_format.code_range[1], x.dtype)
        elif shared is not None and layer.multiplies_blocks:
            quantized = layer.integers()
            grid = quantized.grid
            y = matmul_blocks(shared.values(block_dtype(x.dtype)), quantized, x.dtype)
        else:
            values = weight.detach()
            if _rounds(layer):
                values, grid = layer.rounded(weight, layer.learned_grid())
            inputs = x if shared is None else shared.values(x.dtype)
            y = matmul(inputs.flatten(0, -2), values.t()).view(*x.shape[:-1], -1)
        ctx.layer, ctx.input_dtype = layer, x.dtype
        passes = None if shared is None else shared.passes(x, layer.input_format)
        kept = (x,) if shared is None else (shared.quantized.codes, *shared.quantized.grid)
        ctx.save_for_backward(weight, passes, *grid, *kept)  # so that checkpointing keeps none of it
        return y if bias is None else y.add_(bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, passes, scale, zero_point, *kept = ctx.saved_tensors
        rounds, form, grid = _rounds(ctx.layer), ctx.layer.weight_format, Grid(scale, zero_point)
        needs_x, needs_weight, needs_bias, needs_change, *_ = ctx.needs_input_grad
        grad_x = grad_weight = grad_change = None
        rows = grad.flatten(0, -2)
        if needs_x:
            on = grid if form.by.grid_gives_codes else None
            values = ctx.layer.rounded(weight, on)[0] if rounds else weight
            grad_x = matmul(rows, values).view(*grad.shape[:-1], -1)
            if passes is not None:
                grad_x *= passes
        if needs_weight or needs_change:
            x = kept[0] if len(kept) == 1 else dequantize(Quantized(kept[0], Grid(*kept[1:])), ctx.input_dtype)
            grad_weight = matmul(rows.t(), x.flatten(0, -2))
            if needs_change:
                grad_weight, grad_change = ctx.layer.gradients(grad_weight, weight, grid)
            elif rounds and form.clips:
                grad_weight = passed(grad_weight, weight, form, grid)
        grad_bias = rows.sum(0) if needs_bias else None
        return grad_x, grad_weight if needs_weight else None, grad_bias, grad_change, None, None


def _rounds(layer: QuantLinear) -> bool:
    """Return whether the Parameter's values must be rounded at each call."""
    return layer.weight_format.quantizes and not layer.frozen


def quant_linears(model: nn.Module) -> dict[str, QuantLinear]:
    """Return the quantized layers of a prepared model, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
