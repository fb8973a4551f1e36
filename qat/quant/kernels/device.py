"""Triton kernels; qat.quant.kernels.host launches them.

A program takes one row, or up to 32 short ones, and keeps it in registers: it is read once. Sizes of rows are compiled
in; how many there are is not.

Every operation is rounded as torch rounds it: division is IEEE's (Triton's ``/`` is not), and no product is followed by
a sum, which would be fused. Extremes are found among integers in the order of the floats whose bits they are; NaN is
the largest of them, or the smallest, and so it goes through, which it would not in Triton's maximum of floats.
"""

import triton
import triton.language as tl

from qat.quant.quantizers.base import SMALLEST_SCALE

_SMALLEST = tl.constexpr(SMALLEST_SCALE)
_WHOLE = tl.constexpr(2.0**23)
"""A float of at least this size has no bits for a fraction: adding it rounds to a whole number, half to even. What is
larger itself stays larger than any code."""


@triton.jit
def _bits(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def _float(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _ordered(bits):
    """Map the bits of floats to integers in the same order, and back; 0 maps to 0."""
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _whole_number(x):
    """Round to whole numbers with the sign of x, also where they are 0."""
    size = (tl.abs(x) + _WHOLE) - _WHOLE
    return _float(_bits(size) | (_bits(x) & -0x80000000))


@triton.jit
def _between(x, low, high):
    """Clamp x; NaN stays."""
    x = tl.where(x < low, low, x)
    return tl.where(x > high, high, x)


@triton.jit
def _usable(scale):
    return tl.where(scale < _SMALLEST, 1.0, scale)


@triton.jit
def _minmax(x, qmax: tl.constexpr):
    """The scales [rows] of ``MinMax`` for x [rows, n]."""
    largest = _float(tl.max(_bits(tl.abs(x)), 1))
    return _usable(tl.div_rn(largest, tl.full(largest.shape, qmax, tl.float32)))


@triton.jit
def _minmax_asymmetric(x, qmax: tl.constexpr):
    """The scales and zero points [rows] of ``MinMaxAsymmetric`` for x [rows, n]."""
    order = _ordered(_bits(x))
    low = _float(_ordered(tl.minimum(tl.min(order, 1), 0)))
    high = _float(tl.maximum(tl.max(order, 1), 0))
    levels = tl.full(low.shape, 2 * qmax + 1, tl.float32)
    scale = _usable(tl.div_rn(high, levels) - tl.div_rn(low, levels))
    return scale, _whole_number(tl.div_rn(-low, scale)) - (qmax + 1)


@triton.jit
def _tile(rows, stride, COLUMNS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """This program's rows [ROWS], and, all [ROWS, BLOCK], their elements' offsets to read and to write, and the mask of
    those that exist."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    there = (row < rows)[:, None] & (column < COLUMNS)[None, :]
    return row, row[:, None] * stride + column[None, :], row[:, None] * COLUMNS + column[None, :], there


@triton.jit(do_not_specialize=["rows"])
def round(
    x, result, scales, zeros, rows, stride, GIVEN: tl.constexpr, SYMMETRIC: tl.constexpr, SCALE: tl.constexpr,
    QMAX: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Quantize rows, to codes where ``result`` is of int8, else to their values: on the grid that is ``GIVEN``, or on
    that of their values, which is written."""
    row, source, target, there = _tile(rows, stride, COLUMNS, ROWS, BLOCK)
    value = tl.load(x + source, mask=there, other=0.0).to(tl.float32)
    zero = tl.zeros([ROWS], tl.float32)
    if GIVEN:
        scale = tl.load(scales + row, mask=row < rows, other=1.0)
        if not SYMMETRIC:
            zero = tl.load(zeros + row, mask=row < rows, other=0.0)
    else:
        if SYMMETRIC:
            scale = _minmax(value, QMAX)
        else:
            scale, zero = _minmax_asymmetric(value, QMAX)
            tl.store(zeros + row, zero, mask=row < rows)
        scale = scale.to(SCALE).to(tl.float32)
        scale = tl.where(scale == 0, 1.0, scale)
        tl.store(scales + row, scale, mask=row < rows)
    scale, zero = scale[:, None], zero[:, None]
    code = _whole_number(tl.div_rn(value, tl.broadcast_to(scale, [ROWS, BLOCK])))
    if not SYMMETRIC:
        code = code + zero
    code = _between(code, LOW, HIGH)
    if result.dtype.element_ty == tl.int8:
        tl.store(result + target, code.to(tl.int8), mask=there)
    else:
        if not SYMMETRIC:
            code = code - zero
        tl.store(result + target, (code * scale).to(result.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["rows"])
def values(
    codes, result, scales, zeros, rows, stride, SYMMETRIC: tl.constexpr,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the values of codes."""
    row, source, target, there = _tile(rows, stride, COLUMNS, ROWS, BLOCK)
    code = tl.load(codes + source, mask=there, other=0).to(tl.float32)
    if not SYMMETRIC:
        code = code - tl.load(zeros + row, mask=row < rows, other=0.0)[:, None]
    scale = tl.load(scales + row, mask=row < rows, other=1.0)
    tl.store(result + target, (code * scale[:, None]).to(result.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["rows"])
def multiply(
    x, weight, result, x_scales, weight_scales, x_zeros, weight_zeros, x_sums, weight_sums, rows, x_stride,
    weight_stride, ZEROS: tl.constexpr, COLUMNS: tl.constexpr, OUT: tl.constexpr,
    ROWS: tl.constexpr, OUTS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """Multiply codes [rows, COLUMNS] by weight codes [OUT, COLUMNS], and scale the sums while they are in registers.
    Programs that run at a time share columns of both: eight tiles of rows go through the weight together."""
    tiles, group = tl.cdiv(rows, ROWS), tl.program_id(0) // (8 * ((OUT + OUTS - 1) // OUTS))
    height = tl.minimum(tiles - 8 * group, 8)
    inside = tl.program_id(0) % (8 * ((OUT + OUTS - 1) // OUTS))
    row = (8 * group + inside % height) * ROWS + tl.arange(0, ROWS)
    out = inside // height * OUTS + tl.arange(0, OUTS)
    inner = tl.arange(0, INNER)
    # What lies beyond the ends is a copy of what does not, and is not written.
    x += (row % rows).to(tl.int64)[:, None] * x_stride + inner[None, :]
    weight += (out % OUT).to(tl.int64)[None, :] * weight_stride + inner[:, None]
    total = tl.zeros([ROWS, OUTS], tl.int32)
    for first in range(0, COLUMNS, INNER):
        if COLUMNS % INNER == 0:
            total = tl.dot(tl.load(x), tl.load(weight), total, out_dtype=tl.int32)
        else:
            there = inner < COLUMNS - first
            some = tl.load(x, mask=there[None, :], other=0)
            total = tl.dot(some, tl.load(weight, mask=there[:, None], other=0), total, out_dtype=tl.int32)
        x += INNER
        weight += INNER
    if ZEROS:
        x_zero, weight_zero = tl.load(x_zeros + row % rows)[:, None], tl.load(weight_zeros + out % OUT)[None, :]
        x_sum, weight_sum = tl.load(x_sums + row % rows)[:, None], tl.load(weight_sums + out % OUT)[None, :]
        total = total - weight_zero * x_sum - x_zero * (weight_sum - COLUMNS * weight_zero)
    value = total.to(tl.float32) * tl.load(x_scales + row % rows)[:, None]
    value = value * tl.load(weight_scales + out % OUT)[None, :]
    target = row.to(tl.int64)[:, None] * OUT + out[None, :]
    tl.store(result + target, value.to(result.dtype.element_ty), mask=(row < rows)[:, None] & (out < OUT)[None, :])
