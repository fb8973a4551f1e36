"""Starting the kernels: functions of tensors, with the arguments of the torch functions in whose place they run.

They return None for arguments that there is no kernel for. What is only rounded has the same bits. Norms and SwiGLU add
up, and take exponentials, in their own way: their codes are those of torch, but for a few that differ by one.
"""

import functools
import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import rms_norm, silu

from qat.quant.kernels import device
from qat.quant.kernels.sizes import FEW_ROWS
from qat.quant.quantizers.base import Grid, Quantizer, values_of
from qat.quant.quantizers.minmax import MinMax
from qat.quant.quantizers.minmax_asymmetric import MinMaxAsymmetric
from qat.runtime.machine import current

_LONGEST = 32768
"""Elements of the longest row that fits into a program's registers."""

_LONGEST_NORM = 8192
"""The same for norms, whose gradient keeps several arrays of that length."""

_NORM_PROGRAMS = 256
"""Programs that share a norm's gradient: each adds up its own part of the weight's."""

_PIECE = 4096
"""Elements that a program of SwiGLU and its gradient, and of ``unpair``, takes at a time."""

_ALIGNED = 16
"""Bytes: Triton recompiles a kernel for tensors that do not begin at a multiple of them."""

UNFUSED = {"enable_fp_fusion": False}
"""Option by which a product and the sum after it are rounded one by one, as torch does."""

_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class Tile(NamedTuple):
    """The part of a tensor's rows that one program processes.

    Attributes:
        rows: number of rows
        block: elements of a row, rounded up to a power of two
        warps: number of warps, 32 elements or fewer per thread
    """

    rows: int
    block: int
    warps: int


@functools.cache
def tile(columns: int) -> Tile:
    """Return what a program takes of rows of so many columns."""
    block = triton.next_power_of_2(columns)
    rows = max(1, min(32, 4096 // block))
    return Tile(rows, block, min(32, max(4, rows * block // 1024)))


class Normed(NamedTuple):
    """What ``norm`` gives.

    Attributes:
        values: [rows, n], of the dtype of its input
        roots: [rows], fp32: inverses of the root mean squares
        codes, scale, zero_point: of the values; as ``quantize`` gives them
    """

    values: Tensor
    roots: Tensor
    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None


class ProductTile(NamedTuple):
    """The tile of a matmul that one program computes: rows, outputs, columns per iteration; warps and stages."""

    rows: int
    outs: int
    inner: int
    warps: int
    stages: int


def product_tile(rows: int) -> ProductTile:
    """Return what a program takes of a product of so many rows."""
    return ProductTile(128, 256, 128, 8, 3) if rows > FEW_ROWS else ProductTile(64, 128, 128, 4, 4)


def quantize(rows: Tensor, by: Quantizer, qmax: int) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """Return codes [groups, n], scale and zero point [groups, 1] of rows [groups, n]; None if no kernel takes them."""
    return _found(rows, by, qmax, by.code_dtype)


def round_rows(rows: Tensor, by: Quantizer, qmax: int) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """Return the values [groups, n] of ``quantize``'s codes in place of these, of the dtype of ``rows``."""
    return _found(rows, by, qmax, rows.dtype)


def quantize_on(rows: Tensor, scale: Tensor, zero_point: Tensor | None, by: Quantizer, qmax: int) -> Tensor | None:
    """Return codes [groups, n] of rows on the given grid [groups, 1]; None if no kernel takes them."""
    return _on(rows, scale, zero_point, by, qmax, by.code_dtype)


def round_rows_on(rows: Tensor, scale: Tensor, zero_point: Tensor | None, by: Quantizer, qmax: int) -> Tensor | None:
    """Return the values [groups, n] of ``quantize_on``'s codes in place of these, of the dtype of ``rows``."""
    return _on(rows, scale, zero_point, by, qmax, rows.dtype)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return the values [groups, n], of ``dtype``, of codes on their grid; None if no kernel takes them."""
    if codes.dtype != torch.int8 or dtype not in _TYPES or codes.shape[1] > _LONGEST:
        return None
    return _run(device.values, codes, dtype, scale, zero_point, zero_point is None)


def unpair(pairs: Tensor) -> Tensor:
    """Return the codes [..., 2n], int8, of pairs, uint8 [..., n]: rows [rows, n], or those of several parts [parts,
    rows, n], which may lie apart."""
    parts = pairs.flatten(1) if pairs.dim() == 3 else pairs.reshape(1, -1)
    result = torch.empty(*pairs.shape[:-1], 2 * pairs.shape[-1], dtype=torch.int8, device=pairs.device)
    count = 2 * parts.shape[1]
    blocks = -(-count // _PIECE)
    _start(device.unpair, len(parts) * blocks, (parts, result), (count, blocks), (parts.stride(0), _PIECE), num_warps=4)
    return result


def stored_values(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None, pairs: bool, group: int, dtype: torch.dtype
) -> Tensor | None:
    """Return the values [parts * rows, n], of ``dtype``, of packed rows: the bytes of codes, two to a byte if they are
    ``pairs``, and of fp32 scales, uint8 [parts, rows, bytes], and zero points, int8 [parts, rows, groups]; ``group``
    codes share a scale. All are of one memory, in which parts lie apart. None if no kernel makes ``dtype``."""
    if dtype not in _TYPES:
        return None
    parts, rows, width = codes.shape
    columns = 2 * width if pairs else width
    block = piece(columns)
    result = torch.empty(parts * rows, columns, dtype=dtype, device=codes.device)
    rest = codes.stride(0), pairs, zero_point is None, columns, group, block
    programs = parts * rows * -(-columns // block)
    tensors = codes, scale, zero_point, result
    _start(device.stored_values, programs, tensors, (rows,), rest, num_warps=warps(block))
    return result


def multiply(
    codes: Tensor,
    weight: Tensor,
    x_scale: Tensor,
    weight_scale: Tensor,
    zeros: tuple[Tensor, Tensor, Tensor, Tensor] | None,
    dtype: torch.dtype,
) -> Tensor:
    """Multiply codes [rows, in] by weight codes [out, in], both int8, and scale: what ``product`` and ``_scaled`` do in
    qat.quant.products, or ``_corrected`` with ``zeros``: the zero points of rows and of outputs, and the sums of both's
    codes, all int32."""
    codes, weight = _in_order(codes), _in_order(weight)
    (rows, columns), out = codes.shape, len(weight)
    height, width, inner, warps, stages = product_tile(rows)
    result = torch.empty(rows, out, dtype=dtype, device=codes.device)
    tensors = (codes, weight, result, x_scale.contiguous(), weight_scale.contiguous(), *(zeros or (None,) * 4))
    rest = codes.stride(0), weight.stride(0), zeros is not None, columns, out, height, width, inner
    programs = -(-rows // height) * -(-out // width)
    _start(device.multiply, programs, tensors, (rows,), rest, num_warps=warps, num_stages=stages)
    return result


def norm(rows: Tensor, weight: Tensor, eps: float, by: Quantizer, qmax: int) -> Normed | None:
    """Return the RMSNorm of rows [rows, n] with the weight [n], and its codes; None if no kernel takes them."""
    if not _makes_codes(rows, by) or weight.dtype != rows.dtype or rows.shape[1] > _LONGEST_NORM:
        return None
    rows = _in_order(rows)
    (count, columns), (height, block, warps) = rows.shape, tile(rows.shape[1])
    values, roots = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device), _floats(rows, count)
    codes, scale, zero_point = _empty(rows, by)
    tensors = rows, weight.contiguous(), values, roots, codes, scale, zero_point
    rest = rows.stride(0), eps, by.symmetric, qmax, *by.code_range(qmax), columns, height, block
    _start(device.norm, -(-count // height), tensors, (count,), rest, num_warps=warps, **UNFUSED)
    return Normed(values, roots, codes, scale, zero_point)


def norm_gradients(grad: Tensor, rows: Tensor, weight: Tensor, roots: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of the rows [rows, n] and of the weight [n] of ``norm``, given that of its values."""
    rows, grad = _in_order(rows), grad.contiguous()
    (count, columns), (height, block, warps) = rows.shape, tile(rows.shape[1])
    programs = min(_NORM_PROGRAMS, -(-count // height))
    result = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
    parts = _floats(rows, programs, columns)
    tensors = rows, grad, weight.contiguous(), roots, result, parts
    rest = rows.stride(0), columns, height, block
    _start(device.norm_gradients, programs, tensors, (count,), rest, num_warps=warps, **UNFUSED)
    return result, parts.sum(0).to(weight.dtype)


def gated(gate: Tensor, up: Tensor, by: Quantizer, qmax: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None] | None:
    """Return silu(gate) * up [rows, n], of the dtype of both, and its codes, scale and zero point, as ``quantize``
    gives them; None if no kernel takes them."""
    if not _makes_codes(gate, by) or up.dtype != gate.dtype:
        return None
    gate, up = gate.contiguous(), up.contiguous()
    codes, scale, zero_point = _empty(gate, by)
    values = torch.empty_like(gate)
    block = piece(gate.shape[1])
    tensors = gate, up, values, codes, scale, zero_point
    rest = by.symmetric, qmax, *by.code_range(qmax), gate.shape[1], block
    _start(device.gated, len(gate), tensors, (), rest, num_warps=warps(block), **UNFUSED)
    return values, codes, scale, zero_point


def gated_gradients(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of both inputs of ``gated``, given that of its values; all [..., n]."""
    grad, gate, up = grad.contiguous(), gate.contiguous(), up.contiguous()
    of_gate, of_up = torch.empty_like(gate), torch.empty_like(up)
    tensors, count = (grad, gate, up, of_gate, of_up), gate.numel()
    programs, warped = -(-count // _PIECE), warps(_PIECE)
    _start(device.gated_gradients, programs, tensors, (count,), (_PIECE,), num_warps=warped, **UNFUSED)
    return of_gate, of_up


def check(place: torch.device) -> None:
    """Raise RuntimeError if a kernel cannot run on this device, or gives other codes than torch does."""
    qmax = 7
    pairs = torch.arange(256, device=place).view(2, 8, 16).to(torch.uint8)
    nibbles = torch.stack([pairs & 15, pairs >> 4], -1).flatten(-2).int()
    unpacked_codes = (nibbles ^ 8) - 8
    if not torch.equal(unpair(pairs).int(), unpacked_codes):
        raise RuntimeError("what they unpack is not what torch does")
    scale = torch.linspace(-1, 1, 16, device=place).view(2, 8, 1)
    bytes_of_scale, columns = scale.view(torch.uint8), nibbles.shape[-1]
    stored = torch.cat([pairs.flatten(1), bytes_of_scale.flatten(1)], 1)
    parts = stored[:, : pairs[0].numel()].view(pairs.shape), stored[:, pairs[0].numel() :].view(bytes_of_scale.shape)
    values = stored_values(*parts, None, True, columns, torch.bfloat16)
    if not torch.equal(unpair(parts[0]), unpacked_codes.to(torch.int8)):
        raise RuntimeError("what they unpack of parts that lie apart is not what torch does")
    if values is None or not torch.equal(values, (unpacked_codes * scale).bfloat16().view(-1, columns)):
        raise RuntimeError("what values they unpack is not what torch does")
    for by in (MinMax(), MinMaxAsymmetric()):
        for rows in (_rows_to_try(33, 96).to(place), _rows_to_try(9, 4096).to(place, torch.bfloat16)):
            codes, grid = by.encode(rows, qmax)
            other = Grid(grid.scale * 0.7, grid.zero_point)  # so that values lie beyond the last codes
            on_other = by.codes(rows, other, qmax)
            whole = codes.nan_to_num(0).to(torch.int8)
            for kernel, found, expected in (
                ("quantize", quantize(rows, by, qmax), (codes, *grid)),
                ("round", round_rows(rows, by, qmax), (values_of(codes, grid, rows.dtype), *grid)),
                ("quantize on a grid", (quantize_on(rows, *other, by, qmax),), (on_other,)),
                (
                    "round to a grid",
                    (round_rows_on(rows, *other, by, qmax),),
                    (values_of(on_other, other, rows.dtype),),
                ),
                ("dequantize", (dequantize(whole, *grid, rows.dtype),), (values_of(whole, grid, rows.dtype),)),
            ):
                assert found is not None
                if not all(_same(*parts) for parts in zip(found, expected, strict=True)):
                    raise RuntimeError(f"what they {kernel} by {type(by).__name__} is not what torch does")
        for dtype, columns in ((torch.float32, 96), (torch.bfloat16, 2 * _PIECE)):
            _check_producers(
                torch.randn(4, 33, columns, generator=_generator(), device="cpu").to(place, dtype), by, qmax
            )


def _check_producers(inputs: Tensor, by: Quantizer, qmax: int) -> None:
    """Raise RuntimeError if ``norm`` or ``gated``, or a gradient, is not what torch computes from inputs
    [4, rows, n], but for rounding."""
    rows, up, grad, (weight, *_) = inputs
    x, factor = rows.clone().requires_grad_(), weight.clone().requires_grad_()
    expected = rms_norm(x, (x.shape[1],), factor, 1e-5)
    expected.backward(grad)
    normed = norm(rows, weight, 1e-5, by, qmax)
    assert normed is not None
    gradients = norm_gradients(grad, rows, weight, normed.roots)
    for found, by_torch in zip((normed.values, *gradients), (expected, x.grad, factor.grad), strict=True):
        _check_close("normalize", found, by_torch)
    x, y = rows.clone().requires_grad_(), up.clone().requires_grad_()
    expected = silu(x) * y
    expected.backward(grad)
    product = gated(rows, up, by, qmax)
    assert product is not None
    for found, by_torch in zip((product[0], *gated_gradients(grad, rows, up)), (expected, x.grad, y.grad), strict=True):
        _check_close("gate", found, by_torch)
    for values, codes, *_ in (normed[:1] + normed[2:], product):
        if not _same(codes, by.encode(values, qmax)[0]):
            raise RuntimeError("their codes are not those of the values beside them")


def _check_close(name: str, found: Tensor, expected: Tensor | None) -> None:
    """Raise RuntimeError for a relative error of more than a hundredth."""
    assert expected is not None
    error, size = (found.float() - expected.float()).norm(), expected.float().norm()
    if not error <= 0.01 * size:
        raise RuntimeError(f"what they {name} differs from what torch does by {error / size:.2g} of it")


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _rows_to_try(rows: int, columns: int) -> Tensor:
    """Return fp32 rows with all that is special: zeros, halves between codes, NaN, infinity, one sign alone."""
    x = torch.randn(rows, columns, generator=_generator(), device="cpu")
    x[0], x[1] = 0, torch.arange(columns) % 29 / 2 - 7
    x[2, 3], x[3, 1], x[4, 0], x[5], x[6] = math.nan, math.inf, -math.inf, x[5].abs(), -x[6].abs()
    return x


def _same(found: Tensor | None, expected: Tensor | None) -> bool:
    """Return whether all numbers are equal, but for NaN, which is no particular int8."""
    if found is None or expected is None:
        return found is expected
    equal = (found == expected) | (expected.isnan() & (found.isnan() | (found.dtype == torch.int8)))
    return bool(equal.all())


def _makes_codes(rows: Tensor, by: Quantizer) -> bool:
    """Return whether the kernels that compute what they quantize can find the grid of this quantizer."""
    return type(by) in (MinMax, MinMaxAsymmetric) and by.scale_dtype == torch.float32 and rows.dtype in _TYPES


def _empty(rows: Tensor, by: Quantizer) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return room for the codes [rows, n] of rows, and for their scales and zero points [rows, 1]."""
    codes = torch.empty(rows.shape, dtype=torch.int8, device=rows.device)
    return codes, _floats(rows, len(rows), 1), None if by.symmetric else _floats(rows, len(rows), 1)


def _floats(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def piece(columns: int) -> int:
    """Return how many elements of a row of so many a program of SwiGLU takes at a time."""
    return min(_PIECE, triton.next_power_of_2(columns))


def warps(block: int) -> int:
    """Return the number of warps for so many elements at a time, 16 or fewer per thread."""
    return max(1, block // 512)


def _found(rows: Tensor, by: Quantizer, qmax: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """Return codes, or values, and the grid of a quantizer that ``device.round`` can find the grid of."""
    if type(by) not in (MinMax, MinMaxAsymmetric) or not _fits(rows):
        return None
    scale = torch.empty(len(rows), 1, dtype=torch.float32, device=rows.device)
    zero_point = None if by.symmetric else torch.empty_like(scale)
    constants = False, by.symmetric, _TYPES[by.scale_dtype], qmax, *by.code_range(qmax)
    return _run(device.round, rows, dtype, scale, zero_point, *constants), scale, zero_point


def _on(
    rows: Tensor, scale: Tensor, zero_point: Tensor | None, by: Quantizer, qmax: int, dtype: torch.dtype
) -> Tensor | None:
    """Return codes, or values, on a grid, by a quantizer that makes codes as most do."""
    if type(by).codes is not Quantizer.codes or by.code_dtype != torch.int8 or not _fits(rows):
        return None
    constants = True, zero_point is None, tl.float32, qmax, *by.code_range(qmax)
    return _run(device.round, rows, dtype, scale, zero_point, *constants)


def _fits(rows: Tensor) -> bool:
    return rows.dtype in _TYPES and rows.shape[1] <= _LONGEST


def _run(kernel: Any, rows: Tensor, dtype: torch.dtype, scale: Tensor, zero_point: Tensor | None, *args: Any) -> Tensor:
    """Return what a kernel writes, shaped like rows [rows, n]; ``args`` are compiled in."""
    rows = _in_order(rows)
    result = torch.empty(rows.shape, dtype=dtype, device=rows.device)
    zero_point = None if zero_point is None else zero_point.contiguous()
    (count, columns), (height, block, warps) = rows.shape, tile(rows.shape[1])
    tensors = rows, result, scale.contiguous(), zero_point
    rest = rows.stride(0), *args, columns, height, block
    _start(kernel, -(-count // height), tensors, (count,), rest, num_warps=warps)
    return result


_compiled: dict[tuple[Any, ...], Any] = {}
"""Kernels by what Triton compiles them for."""


def _start(
    kernel: Any,
    programs: int,
    tensors: tuple[Tensor | None, ...],
    counts: tuple[int, ...],
    rest: tuple[Any, ...],
    **options: int,
) -> None:
    """Start a kernel of so many programs, whose parameters are ``tensors``, ``counts`` and the ``rest``.

    Triton would find out at each call what it has to be compiled for, which costs the host more than the start itself.
    Here this is the dtypes of tensors, whether they are aligned, whether a count fits 32 bits, and the rest as it is.
    """
    first = tensors[0]
    assert first is not None
    kinds = [None if x is None else (x.dtype, x.data_ptr() % _ALIGNED == 0) for x in tensors]
    key = kernel.fn.__name__, first.device.index, *kinds, *(count < 2**31 for count in counts), *rest
    with current(first):
        if compiled := _compiled.get(key):
            compiled[programs, 1, 1](*tensors, *counts, *rest)
        elif compiled := kernel[programs, 1, 1](*tensors, *counts, *rest, **options):
            _compiled[key] = compiled  # Triton's interpreter compiles none


def _in_order(rows: Tensor) -> Tensor:
    """Return rows whose elements are neighbours in memory."""
    return rows if rows.stride(1) == 1 else rows.contiguous()
