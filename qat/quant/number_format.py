"""Number formats: a number of bits, a quantizer, and groups of consecutive elements that share a grid.

A group is the last dimension of the tensor given here, or ``group_size`` consecutive elements of it: a weight row (per
channel), the features of one token (per token), the ``head_dim`` of one token and KV head. The quantizer lays a grid
over it (qat.quant.quantizers: one file each).

The gradient is straight-through, and 0 where a value was clipped. ``round_to_grid`` is ``dequantize(quantize(x))``
without the integers in between: training simulates exactly what is exported.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qat.quant.fused import fused, with_kernel
from qat.quant.quantizers import QUANTIZERS
from qat.quant.quantizers.base import (
    Grid,
    LearnedQuantizer,
    Quantizer,
    at_most_half_a_step,
    values_of,
    with_scales,
)

FULL_PRECISION = 16
"""``bits=16`` means "not quantized" everywhere."""


@dataclass(frozen=True)
class Format:
    """A number format: bits, quantizer (by name), elements of a group (0: the complete last dimension), and the dtype
    to which scales are rounded ("float32": to the quantizer's own).

    ``tensor_scale`` is that of the tensors that are quantized, for a quantizer with ``scales_tensors``. Until it is
    known all is NaN.
    """

    bits: int
    quantizer: str = "minmax"
    group_size: int = 0
    scale_dtype: str = "float32"
    tensor_scale: float | None = None

    @property
    def quantizes(self) -> bool:
        """Return whether it has less than full precision."""
        return self.bits != FULL_PRECISION

    @property
    def qmax(self) -> int:
        """Return the largest positive number of as many bits."""
        return 2 ** (self.bits - 1) - 1

    @property
    def code_range(self) -> tuple[int, int]:
        """Return the lowest code and the highest."""
        return self.by.code_range(self.qmax)

    @property
    def code_bits(self) -> int:
        """Return the bits that hold every code: more than ``bits`` where codes are odd numbers."""
        lowest, highest = self.code_range
        return max(-lowest - 1, highest).bit_length() + 1

    @functools.cached_property
    def by(self) -> Quantizer:
        """Return the quantizer itself, which rounds scales to ``scale_dtype``."""
        quantizer = QUANTIZERS[self.quantizer]
        return quantizer if self.scale_dtype == "float32" else with_scales(quantizer, getattr(torch, self.scale_dtype))

    def by_on(self, device: torch.device) -> Quantizer:
        """Return the quantizer, with ``tensor_scale`` as a tensor on ``device`` if it has one."""
        if not self.by.scales_tensors:
            return self.by
        scale = torch.nan if self.tensor_scale is None else self.tensor_scale
        return self.by.for_tensor(torch.full((), scale, dtype=torch.float32, device=device))

    @property
    def symmetric(self) -> bool:
        """Return whether the zero point is 0 everywhere."""
        return self.by.symmetric

    @property
    def clips(self) -> bool:
        """Return whether values beyond the last codes are cut off, and get no gradient."""
        return self.by.clips

    @property
    def scales_tensors(self) -> bool:
        """Return whether it needs a ``tensor_scale``."""
        return self.quantizes and self.by.scales_tensors

    @property
    def learned(self) -> LearnedQuantizer | None:
        """Return the quantizer if it learns its grid, else None."""
        return self.by if self.quantizes and isinstance(self.by, LearnedQuantizer) else None


class Quantized(NamedTuple):
    """A tensor as codes [..., n], int8 but for formats of floats, and the grid [..., groups] that gives them their
    values."""

    codes: Tensor
    grid: Grid


def grid_of(x: Tensor, form: Format) -> Grid:
    """Return the grid that ``form`` lays over x [..., n]; NaN where x has one."""
    return _unrow(form.by_on(x.device).stored_grid(_rows(x, form), form.qmax), x, form)


def quantize(x: Tensor, form: Format, grid: Grid | None = None) -> Quantized:
    """Quantize x [..., n] to codes and their grid; on ``grid``, if it is given."""
    return Quantized(*_on_grid(x, form, grid, _fused_quantize, _fused_quantize_on))


def dequantize(quantized: Quantized, dtype: torch.dtype) -> Tensor:
    """Return the values [..., n], of ``dtype``, of codes on a grid."""
    codes, (scale, _) = quantized
    rows = codes.reshape(-1, codes.shape[-1] // scale.shape[-1])
    return _fused_dequantize(rows, *_rowed(quantized.grid), dtype).view(codes.shape)


def round_to_grid(x: Tensor, form: Format, grid: Grid | None = None) -> tuple[Tensor, Grid]:
    """Compute ``dequantize(quantize(x))`` in one pass and without a gradient: values of x's dtype [..., n], and their
    grid."""
    return _on_grid(x, form, grid, _fused_round, _fused_round_on)


def fake_quantize(x: Tensor, form: Format) -> Tensor:
    """Round x [..., n] to its grid, with the straight-through gradient; with 16 bits return x itself."""
    if not form.quantizes:
        return x
    return _StraightThrough.apply(x, form)


def inside(x: Tensor, form: Format, grid: Grid) -> Tensor:
    """Return True where x [..., n] was not clipped: where the gradient passes."""
    return _fused_inside(_rows(x, form), *_rowed(grid), form.by, form.qmax).view(x.shape)


def may_clip(form: Format, grid: Grid) -> bool:
    """Return whether values may have been clipped on the grid that they gave. CPUs look at its scales, which are few;
    to look at a GPU's is to wait for it."""
    if grid.scale.device.type != "cpu":
        return form.clips
    return form.clips and form.by_on(grid.scale.device).may_clip(grid)


def passed(grad: Tensor, x: Tensor, form: Format, grid: Grid) -> Tensor:
    """Return the gradient [..., n] of rounded values, 0 where x, which gave the grid, was clipped."""
    if not may_clip(form, grid):
        return grad
    return _fused_pass(_rows(grad, form), _rows(x, form), *_rowed(grid), form.by, form.qmax).view(grad.shape)


def learned_gradients(grad: Tensor, x: Tensor, form: Format, grid: Grid) -> tuple[Tensor, Tensor]:
    """Compute the gradients of x [..., n] and of its scales [..., groups] on a learned grid, given that of its values
    (LSQ, arXiv 1902.08153, equation 3). A value within half a step of its code passes its gradient, and gives the
    scale the rounding error; another gives the scale its code."""
    of_x, of_scale = _fused_gradients(_rows(grad, form), _rows(x, form), *_rowed(grid), form.by, form.qmax)
    return of_x.view(x.shape), of_scale.sum(-1).view(grid.scale.shape)


# All arithmetic is done on rows: [groups of x, elements of a group]. Only exact operations and elementwise ones are
# fused, so that the compiled functions and the eager ones give the same bits.


def _on_grid(
    x: Tensor, form: Format, grid: Grid | None, find: Callable[..., Any], use: Callable[..., Tensor]
) -> tuple[Tensor, Grid]:
    """Return the result of ``use`` on ``grid``, shaped like x, and the grid; without one, of ``find``, which finds the
    grid in the same pass if the quantizer allows it."""
    rows, by = _rows(x, form), form.by_on(x.device)
    if grid is None and by.is_exact:
        result, scale, zero_point = find(rows, by, form.qmax)
        found = Grid(scale, zero_point)
    else:
        found = _rowed(grid) if grid is not None else by.stored_grid(rows, form.qmax)
        result = use(rows, *found, by, form.qmax)
    return result.view(x.shape), _unrow(found, x, form)


def _rows(x: Tensor, form: Format) -> Tensor:
    return x.detach().reshape(-1, form.group_size or x.shape[-1])


def _unrow(grid: Grid, x: Tensor, form: Format) -> Grid:
    """Reshape the grid's parts from [rows, 1] to [..., groups]."""
    shape = (*x.shape[:-1], x.shape[-1] // form.group_size if form.group_size else 1)
    return grid.map(lambda part: part.view(shape))


def _rowed(grid: Grid) -> Grid:
    """Reshape the grid's parts from [..., groups] to [rows, 1]."""
    return grid.map(lambda part: part.reshape(-1, 1))


@with_kernel("quantize")
def _fused_quantize(rows: Tensor, by: Quantizer, qmax: int) -> tuple[Tensor, Tensor, Tensor | None]:
    codes, grid = by.encode(rows, qmax)
    return codes.to(by.code_dtype), *grid


@with_kernel("quantize_on")
def _fused_quantize_on(rows: Tensor, scale: Tensor, zero_point: Tensor | None, by: Quantizer, qmax: int) -> Tensor:
    return by.codes(rows, Grid(scale, zero_point), qmax).to(by.code_dtype)


@with_kernel("round_rows")
def _fused_round(rows: Tensor, by: Quantizer, qmax: int) -> tuple[Tensor, Tensor, Tensor | None]:
    codes, grid = by.encode(rows, qmax)
    return values_of(codes, grid, rows.dtype), *grid


@with_kernel("round_rows_on")
def _fused_round_on(rows: Tensor, scale: Tensor, zero_point: Tensor | None, by: Quantizer, qmax: int) -> Tensor:
    grid = Grid(scale, zero_point)
    return values_of(by.codes(rows, grid, qmax), grid, rows.dtype)


@fused
def _fused_pass(
    grad: Tensor, rows: Tensor, scale: Tensor, zero_point: Tensor | None, by: Quantizer, qmax: int
) -> Tensor:
    return grad * by.inside(rows, Grid(scale, zero_point), qmax)


@fused
def _fused_gradients(
    grad: Tensor, rows: Tensor, scale: Tensor, zero_point: Tensor | None, by: Quantizer, qmax: int
) -> tuple[Tensor, Tensor]:
    grid = Grid(scale, zero_point)
    codes = by.codes(rows, grid, qmax)
    passes = at_most_half_a_step(rows, codes, grid, by.half_step)
    if zero_point is not None:
        codes = codes - zero_point
    slope = torch.where(passes, codes - rows.float() / scale, codes)
    return torch.where(passes, grad, 0.0), grad.float() * slope


@with_kernel("dequantize")
def _fused_dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor | None, dtype: torch.dtype) -> Tensor:
    return values_of(codes, Grid(scale, zero_point), dtype)


@fused
def _fused_inside(rows: Tensor, scale: Tensor, zero_point: Tensor | None, by: Quantizer, qmax: int) -> Tensor:
    return by.inside(rows, Grid(scale, zero_point), qmax)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, form: Format) -> Tensor:
        values, grid = round_to_grid(x, form)
        ctx.form = form
        if form.clips:
            ctx.save_for_backward(x, *grid)
        return values

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        if not ctx.form.clips:
            return grad, None
        x, *grid = ctx.saved_tensors
        return passed(grad, x, ctx.form, Grid(*grid)), None
