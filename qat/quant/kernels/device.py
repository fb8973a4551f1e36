"""Triton kernels; qat.quant.kernels.host launches them.

A program takes one row, or up to 32 short ones, and keeps it in registers: it is read once. Sizes of rows are compiled
in; how many there are is not. Those of the MLP are the longest, and two are read: they are taken in pieces.

Every operation is rounded as torch rounds it: division is IEEE's (Triton's ``/`` is not), and no product is followed by
a sum, which would be fused; norms and activations, whose sums and exponentials torch computes otherwise anyway, are
compiled without fusing them. Extremes are found among integers in the order of the floats whose bits they are; NaN is
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
def _extremes(x, SYMMETRIC: tl.constexpr):
    """The least and the largest of x [rows, n] and 0, in the order of ``_ordered``; of its magnitudes if
    ``SYMMETRIC``."""
    order = _bits(tl.abs(x)) if SYMMETRIC else _ordered(_bits(x))
    return tl.minimum(tl.min(order, 1), 0), tl.maximum(tl.max(order, 1), 0)


@triton.jit
def _grid(low, high, QMAX: tl.constexpr, SYMMETRIC: tl.constexpr):
    """The scales and zero points [rows] of ``MinMax``, or of ``MinMaxAsymmetric``, for rows with these extremes."""
    if SYMMETRIC:
        largest = _float(high)
        scale = _usable(tl.div_rn(largest, tl.full(largest.shape, QMAX, tl.float32)))
        zero = tl.zeros(scale.shape, tl.float32)
    else:
        low, high = _float(_ordered(low)), _float(high)
        levels = tl.full(low.shape, 2 * QMAX + 1, tl.float32)
        scale = _usable(tl.div_rn(high, levels) - tl.div_rn(low, levels))
        zero = _whole_number(tl.div_rn(-low, scale)) - (QMAX + 1)
    return scale, zero


@triton.jit
def _codes(x, scale, zero, SYMMETRIC: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr):
    """The codes, as floats, of x [rows, n] on the grid of its rows [rows]."""
    code = _whole_number(tl.div_rn(x, tl.broadcast_to(scale[:, None], x.shape)))
    if not SYMMETRIC:
        code = code + zero[:, None]
    return _between(code, LOW, HIGH)


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
        low, high = _extremes(value, SYMMETRIC)
        scale, zero = _grid(low, high, QMAX, SYMMETRIC)
        if not SYMMETRIC:
            tl.store(zeros + row, zero, mask=row < rows)
        scale = scale.to(SCALE).to(tl.float32)
        scale = tl.where(scale == 0, 1.0, scale)
        tl.store(scales + row, scale, mask=row < rows)
    code = _codes(value, scale, zero, SYMMETRIC, LOW, HIGH)
    if result.dtype.element_ty == tl.int8:
        tl.store(result + target, code.to(tl.int8), mask=there)
    else:
        if not SYMMETRIC:
            code = code - zero[:, None]
        tl.store(result + target, (code * scale[:, None]).to(result.dtype.element_ty), mask=there)


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


@triton.jit(do_not_specialize=["count", "blocks"])
def unpair(pairs, result, count, blocks, stride, BLOCK: tl.constexpr):
    """Write the ``count`` codes of each part's pairs, the one in a byte's low bits first. A part has ``blocks``
    programs."""
    part, at = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    byte = tl.load(pairs + part * stride + at // 2, mask=at < count, other=0).to(tl.int32)
    code = (byte >> (at % 2 * 4)) & 15
    tl.store(result + part * count + at, ((code ^ 8) - 8).to(tl.int8), mask=at < count)


@triton.jit(do_not_specialize=["rows"])
def stored_values(
    codes, scales, zeros, result, rows, stride, PAIRS: tl.constexpr, SYMMETRIC: tl.constexpr,
    COLUMNS: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the values of packed rows, of which each part has ``rows``. Parts are ``stride`` bytes apart. Scales are
    fp32, in bytes that need not be aligned."""
    blocks: tl.constexpr = (COLUMNS + BLOCK - 1) // BLOCK
    row, at = tl.program_id(0) // blocks, tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    there, part, own = at < COLUMNS, (row // rows).to(tl.int64) * stride, (row % rows).to(tl.int64)
    if PAIRS:
        byte = tl.load(codes + part + own * (COLUMNS // 2) + at // 2, mask=there, other=0).to(tl.int32)
        code = ((byte >> (at % 2 * 4) & 15) ^ 8) - 8
    else:
        code = (tl.load(codes + part + own * COLUMNS + at, mask=there, other=0).to(tl.int32) ^ 128) - 128
    group = own * (COLUMNS // GROUP) + at // GROUP
    place, bits = scales + part + 4 * group, tl.zeros([BLOCK], tl.int32)
    for byte in tl.static_range(4):
        bits = bits | (tl.load(place + byte, mask=there, other=0).to(tl.int32) << (8 * byte))
    value = code.to(tl.float32)
    if not SYMMETRIC:
        value = value - tl.load(zeros + part + group, mask=there, other=0).to(tl.float32)
    value = value * bits.to(tl.float32, bitcast=True)
    tl.store(result + row.to(tl.int64) * COLUMNS + at, value.to(result.dtype.element_ty), mask=there)


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


@triton.jit(do_not_specialize=["rows"])
def norm(
    x, weight, result, roots, codes, scales, zeros, rows, stride, EPS: tl.constexpr, SYMMETRIC: tl.constexpr,
    QMAX: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """RMSNorm of rows, and the codes and grid of what it gives, which is rounded to its dtype before; ``roots`` are the
    inverses of the root mean squares, for ``norm_gradients``."""
    row, source, target, there = _tile(rows, stride, COLUMNS, ROWS, BLOCK)
    kind = result.dtype.element_ty
    value = tl.load(x + source, mask=there, other=0.0).to(tl.float32)
    mean = tl.div_rn(tl.sum(value * value, 1), tl.full([ROWS], COLUMNS, tl.float32))
    root = tl.div_rn(tl.full([ROWS], 1.0, tl.float32), tl.sqrt_rn(mean + EPS))
    tl.store(roots + row, root, mask=row < rows)
    column = tl.arange(0, BLOCK)
    factor = tl.load(weight + column, mask=column < COLUMNS, other=0.0).to(tl.float32)
    value = (value * root[:, None]).to(kind).to(tl.float32)
    value = (value * factor[None, :]).to(kind)
    tl.store(result + target, value, mask=there)
    value = value.to(tl.float32)
    low, high = _extremes(value, SYMMETRIC)
    scale, zero = _grid(low, high, QMAX, SYMMETRIC)
    tl.store(scales + row, scale, mask=row < rows)
    if not SYMMETRIC:
        tl.store(zeros + row, zero, mask=row < rows)
    code = _codes(value, scale, zero, SYMMETRIC, LOW, HIGH)
    tl.store(codes + target, code.to(tl.int8), mask=there)


@triton.jit(do_not_specialize=["rows"])
def norm_gradients(
    x, grad, weight, roots, result, of_weight, rows, stride,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of the rows that ``norm`` was given, and this program's part [programs, n] of the weight's: of the
    tiles that it takes, one after another."""
    column = tl.arange(0, BLOCK)
    factor = tl.load(weight + column, mask=column < COLUMNS, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        there = (row < rows)[:, None] & (column < COLUMNS)[None, :]
        target = row[:, None] * COLUMNS + column[None, :]
        slope = tl.load(grad + target, mask=there, other=0.0).to(tl.float32)
        value = tl.load(x + row[:, None] * stride + column[None, :], mask=there, other=0.0).to(tl.float32)
        root = tl.load(roots + row, mask=row < rows, other=0.0)[:, None]
        value = value * root
        total += tl.sum(slope * value.to(x.dtype.element_ty).to(tl.float32), 0)
        slope = slope * factor[None, :]
        mean = tl.div_rn(tl.sum(slope * value, 1), tl.full([ROWS], COLUMNS, tl.float32))[:, None]
        slope = (slope - value * mean) * root
        tl.store(result + target, slope.to(result.dtype.element_ty), mask=there)
    tl.store(of_weight + tl.program_id(0) * COLUMNS + column, total, mask=column < COLUMNS)


@triton.jit
def _sigmoid(x):
    return tl.div_rn(tl.full(x.shape, 1.0, tl.float32), 1.0 + tl.exp(-x))


@triton.jit
def gated(
    gate, up, result, codes, scales, zeros, SYMMETRIC: tl.constexpr,
    QMAX: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """SwiGLU, silu(gate) * up, each rounded to its dtype, of one row, and the codes and grid of what it gives."""
    start = tl.program_id(0).to(tl.int64) * COLUMNS
    kind = result.dtype.element_ty
    low, high = tl.zeros([1], tl.int32), tl.zeros([1], tl.int32)
    for first in range(0, COLUMNS, BLOCK):
        column = first + tl.arange(0, BLOCK)[None, :]
        there = column < COLUMNS
        x = tl.load(gate + start + column, mask=there, other=0.0).to(tl.float32)
        value = (x * _sigmoid(x)).to(kind).to(tl.float32)
        value = (value * tl.load(up + start + column, mask=there, other=0.0).to(tl.float32)).to(kind)
        tl.store(result + start + column, value, mask=there)
        lowest, highest = _extremes(value.to(tl.float32), SYMMETRIC)
        low, high = tl.minimum(low, lowest), tl.maximum(high, highest)
    scale, zero = _grid(low, high, QMAX, SYMMETRIC)
    row = tl.program_id(0) + tl.arange(0, 1)
    tl.store(scales + row, scale)
    if not SYMMETRIC:
        tl.store(zeros + row, zero)
    tl.debug_barrier()  # the values are read again, maybe by other threads than those that wrote them
    for first in range(0, COLUMNS, BLOCK):
        column = first + tl.arange(0, BLOCK)[None, :]
        value = tl.load(result + start + column, mask=column < COLUMNS, other=0.0).to(tl.float32)
        code = _codes(value, scale, zero, SYMMETRIC, LOW, HIGH)
        tl.store(codes + start + column, code.to(tl.int8), mask=column < COLUMNS)


@triton.jit(do_not_specialize=["count"])
def gated_gradients(grad, gate, up, of_gate, of_up, count, BLOCK: tl.constexpr):
    """The gradients of ``gated``'s inputs, all contiguous with ``count`` elements; what torch rounds, is rounded."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = at < count
    kind = of_gate.dtype.element_ty
    x = tl.load(gate + at, mask=there, other=0.0).to(tl.float32)
    slope = tl.load(grad + at, mask=there, other=0.0).to(tl.float32)
    sigmoid = _sigmoid(x)
    tl.store(of_up + at, (slope * (x * sigmoid).to(kind).to(tl.float32)).to(kind), mask=there)
    slope = (slope * tl.load(up + at, mask=there, other=0.0).to(tl.float32)).to(kind).to(tl.float32)
    tl.store(of_gate + at, (slope * sigmoid * (1.0 + x * (1.0 - sigmoid))).to(kind), mask=there)
