"""The interface of a quantizer: a grid for each group of values, the codes on it, and the values of the codes.

    scale, zero = grid(group)
    code  = round(x / scale) + zero      half to even, in fp32, whatever the dtype of x
    x_hat = (code - zero) * scale        rounded once, to the dtype of x

A group is a row here: quantizers get [groups, elements of a group], see qat.quant.number_format. ``qmax`` is
2**(bits-1) - 1: 7 for 4 bits. A scale may be negative.
"""

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from enum import Enum
from functools import cache
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

SMALLEST_SCALE = torch.finfo(torch.float32).tiny


class Grid(NamedTuple):
    """The positions of the codes' values: fp32 scale [..., groups], and zero point of the same shape, if there is one:
    a whole number between the lowest code and the highest. (Activations on a learned grid may have any.)"""

    scale: Tensor
    zero_point: Tensor | None = None

    def map(self, change: Callable[[Tensor], Tensor]) -> "Grid":
        """Return a grid with both parts [..., groups] changed by ``change``."""
        return Grid(change(self.scale), None if self.zero_point is None else change(self.zero_point))


class FloatFormat(Enum):
    """The formats of floats that engines have kernels for: codes, and what shares a scale."""

    FP8 = "e4m3, a scale per row"
    FP8_TENSOR = "e4m3, a scale per tensor"
    MXFP4 = "e2m1, an exponent per 32"
    NVFP4 = "e2m1, an e4m3 scale per 16, and a scale per tensor"


class Quantizer:
    """A way to quantize. A new one defines what differs, and is added to ``qat.quant.quantizers.QUANTIZERS``.

    Attributes:
        meaning: a few words for ``--help``
        parts: the parts of a model that it can quantize: weights, activations, kv
        symmetric: whether the zero point is 0 everywhere
        full_range: whether -qmax - 1 is a code too; always, with zero points
        clips: whether values beyond the last codes are cut off; they get no gradient
        allowed_bits: the numbers of bits that it has
        is_float: whether codes are floating-point numbers, not integers
        code_dtype: a code is a number of this dtype: its value over the scale, plus the zero point
        group_size: the number of elements that share a scale, where the quantizer determines it; 0 if it does not
        scale_dtype: the dtype in which scales are stored: they are its values, though the grid holds them in fp32
        half_step: half the distance of neighbouring codes, in scales: the largest error of what is not clipped
        is_exact: whether ``grid`` has only exact operations (min, max, abs, round) and elementwise ones, so that
            compiled code gives the same bits as eager code. A sum is not exact, as compiled code adds in another order,
            unless it is of whole numbers that the dtype holds
        grid_gives_codes: whether ``codes`` on the grid of ``encode`` are the codes of ``encode``; not where codes are
            made before the scale is rounded, as ggml makes them
        float_format: the format in which engines store its codes, if they are floats that engines have
        added_to_qmax: a in scale = max|x| / (qmax + a), the engines' rules for activations; None for other rules
        gguf_types: the types of GGUF that hold its codes as weights, by bits
        rounds_as_llama_cpp: whether llama.cpp rounds activations like this
        learned: whether the grid is that of Parameters, see LearnedQuantizer
        scales_tensors: whether the groups' scales are in units of a scale of the tensor's, or are that scale, which is
            fixed before training; ``grid`` is then that of ``for_tensor``
        margin: factor by which inputs may exceed those of the calibration text, in such scales
        scale_bytes: the bytes in which ``scale_to_bits`` keeps a scale
    """

    meaning: ClassVar[str]
    parts: ClassVar[tuple[str, ...]] = ("weights", "activations", "kv")
    symmetric: ClassVar[bool] = True
    full_range: ClassVar[bool] = False
    clips: ClassVar[bool] = False
    allowed_bits: ClassVar[Sequence[int]] = range(2, 9)
    is_float: ClassVar[bool] = False
    code_dtype: ClassVar[torch.dtype] = torch.int8
    group_size: ClassVar[int] = 0
    scale_dtype: torch.dtype = torch.float32
    half_step: ClassVar[float] = 0.5
    is_exact: ClassVar[bool] = True
    grid_gives_codes: ClassVar[bool] = True
    float_format: ClassVar[FloatFormat | None] = None
    added_to_qmax: ClassVar[float | None] = None
    gguf_types: ClassVar[Mapping[int, str]] = {
        **dict.fromkeys((2, 3, 4), "Q4_0"),
        5: "Q5_0",
        **dict.fromkeys((6, 7, 8), "Q8_0"),
    }
    rounds_as_llama_cpp: ClassVar[bool] = False
    learned: ClassVar[bool] = False
    scales_tensors: ClassVar[bool] = False
    margin: ClassVar[float] = 1.0
    scale_bytes: ClassVar[int] = 4
    tensor_scale: Tensor

    def scale_of_tensor(self, largest: float) -> float:
        """Compute the scale of a tensor, or of several that engines fuse, whose largest magnitude is given."""
        raise NotImplementedError

    def for_tensor(self, scale: Tensor) -> "Quantizer":
        """Return this quantizer for tensors with the given scale, fp32 []."""
        bound = copy(self)
        bound.tensor_scale = scale
        return bound

    @property
    def scale_can_learn(self) -> bool:
        """Return whether a scale can be a Parameter: it is any fp32 number, and gives integer codes."""
        return self.grid_gives_codes and not self.is_float and self.scale_dtype == torch.float32

    def grid(self, rows: Tensor, qmax: int) -> Grid:
        """Compute the grid [groups, 1] of rows [groups, n], its scale not rounded to ``scale_dtype`` yet."""
        raise NotImplementedError

    def stored_grid(self, rows: Tensor, qmax: int) -> Grid:
        """Compute ``grid`` [groups, 1] with the scale as it is stored."""
        grid = self.grid(rows, qmax)
        if self.scale_dtype == torch.float32:
            return grid
        return Grid(stored(grid.scale, self.scale_dtype), grid.zero_point)

    def code_range(self, qmax: int) -> tuple[int, int]:
        """Return the lowest code and the highest."""
        return -qmax - int(self.full_range or not self.symmetric), qmax  # torch 2.11 cannot compile a sum with a bool

    def encode(self, rows: Tensor, qmax: int) -> tuple[Tensor, Grid]:
        """Compute codes [groups, n] in fp32 and their grid [groups, 1] of rows [groups, n]."""
        grid = self.stored_grid(rows, qmax)
        return self.codes(rows, grid, qmax), grid

    def codes(self, rows: Tensor, grid: Grid, qmax: int) -> Tensor:
        """Compute codes [groups, n], in fp32, of rows [groups, n] on a grid [groups, 1]. Where nothing is clipped,
        clamping moves nothing by more than half a step."""
        codes = torch.round(rows.float() / grid.scale)
        if grid.zero_point is not None:
            codes.add_(grid.zero_point)
        return codes.clamp_(*self.code_range(qmax))

    def inside(self, rows: Tensor, grid: Grid, qmax: int) -> Tensor:
        """Return True [groups, n] where a value was not clipped: where its gradient passes."""
        if grid.zero_point is None:
            return rows.abs() <= grid.scale * qmax
        low, high = (-qmax - 1 - grid.zero_point) * grid.scale, (qmax - grid.zero_point) * grid.scale
        return (low <= rows) & (rows <= high)

    def may_clip(self, grid: Grid) -> bool:
        """Return whether a value may lie beyond the last codes of the grid that its group gave."""
        return self.clips

    def to_bits(self, codes: Tensor) -> Tensor:
        """Return codes [...], of ``code_dtype``, as they are kept in memory: in the last bits of an int8."""
        return codes.view(torch.int8)

    def from_bits(self, bits: Tensor) -> Tensor:
        """Undo ``to_bits``, given int8 [...] whose sign is that of the last bits."""
        return bits

    def scale_to_bits(self, scale: Tensor) -> Tensor:
        """Return scales [..., groups] as they are kept in memory: uint8 [..., groups * scale_bytes]."""
        return scale.contiguous().view(torch.uint8)

    def scale_from_bits(self, bits: Tensor) -> Tensor:
        """Undo ``scale_to_bits``: return fp32 [..., groups]."""
        return bits.contiguous().view(torch.float32)


def values_of(codes: Tensor, grid: Grid, dtype: torch.dtype) -> Tensor:
    """Return the values [groups, n], of ``dtype``, of codes, which are of a quantizer's ``code_dtype`` or fp32."""
    codes = codes.float()
    if grid.zero_point is not None:
        codes = codes - grid.zero_point
    return (codes * grid.scale).to(dtype)


@cache
def with_scales(quantizer: Quantizer, dtype: torch.dtype) -> Quantizer:
    """Return a quantizer that differs from ``quantizer`` by its scales' dtype, always the same object."""
    changed = copy(quantizer)
    changed.scale_dtype = dtype
    return changed


def at_most_half_a_step(rows: Tensor, codes: Tensor, grid: Grid, half_step: float) -> Tensor:
    """Return True [groups, n] where a value is not clipped: where it is not farther from its code's than rounding can
    move it."""
    if grid.zero_point is not None:
        codes = codes - grid.zero_point
    return (codes - rows.float() / grid.scale).abs() <= half_step


class LearnedQuantizer(Quantizer):
    """A quantizer of activations whose grid is learned: a Parameter [size] per layer, the same for all its tokens."""

    size: ClassVar[int] = 1
    parts = ("activations",)
    clips = True
    learned = True

    def initial(self, x: Tensor, qmax: int) -> Tensor:
        """Compute the initial Parameter [size] from activations x [..., n]; ranks start with the mean of theirs."""
        raise NotImplementedError

    def fake_quantize(self, x: Tensor, parameter: Tensor, qmax: int) -> Tensor:
        """Round x [..., n] to its grid, with gradients for x and for ``parameter``."""
        raise NotImplementedError


def usable(scale: Tensor) -> Tensor:
    """Replace by 1 the scales [...] that would be denormal (above all of groups of zeros), hence zero codes: a denormal
    scale has too few bits left to keep the codes in range. NaN stays NaN."""
    return torch.where(scale < SMALLEST_SCALE, 1.0, scale)


def stored(scale: Tensor, dtype: torch.dtype, zero: float = 1.0) -> Tensor:
    """Round fp32 scales [...] to ``dtype``; return them in fp32. Where one becomes 0 it is ``zero``: with 1, zero
    codes."""
    rounded = scale.to(dtype).float()
    return torch.where(rounded == 0, zero, rounded)


def divided(x: Tensor, number: int) -> Tensor:
    """Compute x / number, x being [...], in fp32, correctly rounded on every device. Compilers and GPUs turn a division
    by a number into a product with its reciprocal; in fp64 the error of that is too small to change the rounding to
    fp32, as no quotient by an odd number below 2^9 lies nearer than 2^-34 to the middle between two fp32 numbers."""
    return (x.double() / number).float()
