"""The number formats: integers with a scale, and for the asymmetric one a zero point, per group.

A group is the last dimension of the tensor given here, or ``group_size`` consecutive elements of it: a
weight row (per channel), the features of one token (per token), the ``head_dim`` of one token and KV head.

    qmax  = 2**(bits-1) - 1              the largest code: 7 for 4 bits
    code  = round(x / scale) + zero      half to even, in fp32, whatever the dtype of x
    x_hat = (code - zero) * scale        rounded once, to the dtype of x

Methods, which differ in the grid that they lay over a group:

``minmax``             scale = max|x| / qmax; codes in [-qmax, qmax]. Nothing is clipped: outliers carry the
                       model (LLM-QAT, arXiv 2305.17888, section 2.2). The default, and the paper's choice
``minmax_asymmetric``  scale = (max - min) / (2 qmax + 1) over the range that holds 0; codes in [-qmax-1, qmax]
``statsq``             scale = 2 mean|x| / qmax; what is larger is clipped (OFQ, arXiv 2302.02210, section 4.1)
``lsq``                scale is learned, one for a whole tensor; what is larger is clipped (arXiv 1902.08153)

The gradient is straight-through, and 0 where a value was clipped. ``round_to_grid`` is
``dequantize(quantize(x))`` without the integers in between: training simulates exactly what is exported.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from qat.quant.fused import fused

FULL_PRECISION = 16
"""``bits=16`` means "not quantized" everywhere."""

METHODS = ("minmax", "minmax_asymmetric", "statsq", "lsq")

_SMALLEST_SCALE = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Format:
    """A number format: how many bits, which grid, over how many consecutive elements (0: the whole last dimension)."""

    bits: int
    method: str = "minmax"
    group_size: int = 0

    @property
    def quantizes(self) -> bool:
        return self.bits != FULL_PRECISION

    @property
    def qmax(self) -> int:
        """The largest code."""
        return 2 ** (self.bits - 1) - 1

    @property
    def symmetric(self) -> bool:
        return self.method != "minmax_asymmetric"

    @property
    def learned(self) -> bool:
        """Whether the scale is a Parameter."""
        return self.quantizes and self.method == "lsq"

    @property
    def clips(self) -> bool:
        """Whether values beyond the largest code are cut off, and get no gradient."""
        return self.method in ("statsq", "lsq")


class Grid(NamedTuple):
    """Where the codes lie: fp32 scale [..., groups], and zero point of the same shape where there is one."""

    scale: Tensor
    zero_point: Tensor | None = None

    def map(self, change: Callable[[Tensor], Tensor]) -> "Grid":
        """Both parts, changed alike."""
        return Grid(change(self.scale), None if self.zero_point is None else change(self.zero_point))


class Quantized(NamedTuple):
    """A tensor as integers: int8 codes [..., n], and the grid [..., groups] that gives them their values."""

    codes: Tensor
    grid: Grid


def grid_of(x: Tensor, form: Format) -> Grid:
    """The grid that ``form`` lays over x [..., n].

    A group whose scale would be denormal (all zeros, above all) gets scale 1, hence zero codes: a denormal scale
    has too few bits left to keep the codes in range. NaN stays NaN.
    """
    return _unrow(_grid(_rows(x, form), form), x, form)


def quantize(x: Tensor, form: Format, grid: Grid | None = None) -> Quantized:
    """x [..., n] -> int8 codes and grid; on the ``grid`` given, if one is."""
    rows = _rows(x, form)
    if grid is None and form.method != "statsq":
        codes, *found = _fused_quantize(rows, form.qmax, form.symmetric)
    else:
        found = _rowed(grid) if grid is not None else _grid(rows, form)
        codes = _fused_quantize_on(rows, *found, form.qmax)
    return Quantized(codes.view(x.shape), _unrow(Grid(*found), x, form))


def dequantize(quantized: Quantized, dtype: torch.dtype) -> Tensor:
    """Codes and grid -> values [..., n] of ``dtype``."""
    codes, (scale, _) = quantized
    rows = codes.reshape(-1, codes.shape[-1] // scale.shape[-1])
    return _fused_dequantize(rows, *_rowed(quantized.grid), dtype).view(codes.shape)


def round_to_grid(x: Tensor, form: Format, grid: Grid | None = None) -> tuple[Tensor, Grid]:
    """``dequantize(quantize(x))`` in one pass and without a gradient: values of x's dtype [..., n], and their grid."""
    rows = _rows(x, form)
    if grid is None and form.method != "statsq":
        values, *found = _fused_round(rows, form.qmax, form.symmetric)
    else:
        found = _rowed(grid) if grid is not None else _grid(rows, form)
        values = _fused_round_on(rows, *found, form.qmax)
    return values.view(x.shape), _unrow(Grid(*found), x, form)


def fake_quantize(x: Tensor, form: Format) -> Tensor:
    """x rounded to its grid, with the straight-through gradient of a format that does not clip; 16 bits: x itself."""
    if not form.quantizes:
        return x
    assert not form.clips
    return _StraightThrough.apply(x, form)


def inside(x: Tensor, form: Format, grid: Grid) -> Tensor:
    """True where x [..., n] was not clipped: where the gradient passes."""
    limit = _rowed(grid)[0] * form.qmax
    return (_rows(x, form).abs() <= limit).view(x.shape)


def lsq(x: Tensor, step: Tensor, form: Format) -> Tensor:
    """x rounded to codes times the learned ``step`` [1], with LSQ's gradients for both."""
    return _LearnedStep.apply(x, step, form)


def lsq_initial_step(mean: Tensor, form: Format) -> Tensor:
    """LSQ's first step for values whose mean magnitude is ``mean``: 2 mean|x| / sqrt(qmax) (section 2.1 there)."""
    return 2 * mean / form.qmax**0.5


# All arithmetic happens below, on rows: [groups of x, elements of a group]. Only exact operations (abs, max, round)
# and elementwise ones are fused, so that the compiled functions and the eager ones give the same bits.


def _rows(x: Tensor, form: Format) -> Tensor:
    return x.detach().reshape(-1, form.group_size or x.shape[-1])


def _unrow(grid: Grid, x: Tensor, form: Format) -> Grid:
    """[rows, 1] -> [..., groups]."""
    shape = (*x.shape[:-1], x.shape[-1] // form.group_size if form.group_size else 1)
    return grid.map(lambda part: part.view(shape))


def _rowed(grid: Grid) -> Grid:
    """[..., groups] -> [rows, 1]."""
    return grid.map(lambda part: part.reshape(-1, 1))


def _grid(rows: Tensor, form: Format) -> Grid:
    if form.method == "statsq":  # never fused: a compiled sum adds in another order
        return Grid(_usable(rows.abs().float().mean(-1, keepdim=True) * (2 / form.qmax)))
    return _minmax(rows, form.qmax, form.symmetric)


def _minmax(rows: Tensor, qmax: int, symmetric: bool) -> Grid:
    if symmetric:
        return Grid(_usable(_divided(rows.abs().amax(-1, keepdim=True).float(), qmax)))
    low = rows.amin(-1, keepdim=True).float().clamp(max=0)
    high = rows.amax(-1, keepdim=True).float().clamp(min=0)
    levels = 2 * qmax + 1
    scale = _usable(_divided(high, levels) - _divided(low, levels))
    return Grid(scale, torch.round(-low / scale) - (qmax + 1))


def _divided(x: Tensor, number: int) -> Tensor:
    """fp32 x / number, rounded correctly by whatever computes it. Compilers and GPUs turn a division by a number into
    a product with its reciprocal; in fp64 the error of that is too small to change the rounding to fp32, as no quotient
    by an odd number below 2^9 lies nearer than 2^-34 to the middle between two fp32 numbers."""
    return (x.double() / number).float()


def _usable(scale: Tensor) -> Tensor:
    return torch.where(scale < _SMALLEST_SCALE, 1.0, scale)


def codes_of(rows: Tensor, grid: Grid, qmax: int) -> Tensor:
    """In fp32, element by element. Clamping changes nothing under ``minmax``, whose largest element has the largest
    code."""
    codes = torch.round(rows.float() / grid.scale)
    if grid.zero_point is None:
        return codes.clamp_(-qmax, qmax)
    return codes.add_(grid.zero_point).clamp_(-qmax - 1, qmax)


def values_of(codes: Tensor, grid: Grid, dtype: torch.dtype) -> Tensor:
    if grid.zero_point is not None:
        codes = codes - grid.zero_point
    return (codes * grid.scale).to(dtype)


@fused
def _fused_quantize(rows: Tensor, qmax: int, symmetric: bool):
    grid = _minmax(rows, qmax, symmetric)
    return codes_of(rows, grid, qmax).to(torch.int8), *grid


@fused
def _fused_quantize_on(rows: Tensor, scale: Tensor, zero_point: Tensor | None, qmax: int):
    return codes_of(rows, Grid(scale, zero_point), qmax).to(torch.int8)


@fused
def _fused_round(rows: Tensor, qmax: int, symmetric: bool):
    grid = _minmax(rows, qmax, symmetric)
    return values_of(codes_of(rows, grid, qmax), grid, rows.dtype), *grid


@fused
def _fused_round_on(rows: Tensor, scale: Tensor, zero_point: Tensor | None, qmax: int):
    grid = Grid(scale, zero_point)
    return values_of(codes_of(rows, grid, qmax), grid, rows.dtype)


@fused
def _fused_dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor | None, dtype: torch.dtype):
    return values_of(codes, Grid(scale, zero_point), dtype)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, form: Format) -> Tensor:
        return _fused_round(_rows(x, form), form.qmax, form.symmetric)[0].view(x.shape)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _LearnedStep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, step: Tensor, form: Format) -> Tensor:
        ctx.save_for_backward(x, step)
        ctx.form = form
        rows = x.detach().reshape(-1, x.shape[-1])
        scale = _usable(step.detach().float()).expand(len(rows), 1)
        return _fused_round_on(rows, scale, None, form.qmax).view(x.shape)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, step = ctx.saved_tensors
        rows = (grad.reshape(-1, x.shape[-1]), x.reshape(-1, x.shape[-1]))
        grad_x, slope = _learned_step_gradients(*rows, _usable(step.float()), ctx.form.qmax)
        # LSQ's gradient scale (section 2.2 there) keeps the step's updates as large as the weights'.
        grad_step = (slope.sum() / (x.numel() * ctx.form.qmax) ** 0.5).to(step.dtype).view(step.shape)
        return grad_x.view(x.shape), grad_step, None


@fused
def _learned_step_gradients(grad: Tensor, x: Tensor, step: Tensor, qmax: int) -> tuple[Tensor, Tensor]:
    """Gradient of x, and the step's before it is summed: round(v) - v inside, the largest code outside."""
    scaled = x / step
    codes = torch.round(scaled).clamp(-qmax, qmax)
    passes = scaled.abs() <= qmax
    return torch.where(passes, grad, 0.0), grad.float() * torch.where(passes, codes - scaled, codes)
