"""Codes and their grids as bytes: what a packed layer, a cache of integers, and a sharded weight that is gathered as
codes (qat.train.code_gather) hold."""

import torch
from torch import Tensor

from qat.quant import kernels
from qat.quant.fused import fused
from qat.quant.number_format import Format, Quantized, dequantize
from qat.quant.quantizers.base import Grid

STAND_IN = "packed_codes"
"""The attribute of a Parameter [out, in] that says its values are not here, and holds instead uint8 [parts, bytes]: the
``pack_rows`` of each part of its rows."""


def pack(quantized: Quantized, form: Format) -> Tensor:
    """Pack codes [..., n] and their grid into uint8 [..., bytes]: the codes (two per byte up to 4 bits), then scales
    (fp32, but for formats that round them), then the zero points if the format has them."""
    codes, (scale, zero_point) = quantized
    by = form.by_on(codes.device)
    packed = by.to_bits(codes).view(torch.uint8)
    if form.bits <= 4:
        packed = (packed[..., 0::2] & 15) | (packed[..., 1::2] << 4)
    parts = [packed, by.scale_to_bits(scale)]
    if zero_point is not None:
        parts.append(zero_point.to(torch.int8).view(torch.uint8))
    return torch.cat(parts, -1)


def unpack(packed: Tensor, form: Format) -> Quantized:
    """Unpack uint8 [..., bytes] to codes [..., n] and their grid [..., groups]: the inverse of ``pack``."""
    by = form.by_on(packed.device)
    group_bytes = by.scale_bytes + (not form.symmetric)
    of_codes = form.group_size // 2 if form.bits <= 4 else form.group_size
    groups = packed.shape[-1] // (of_codes + group_bytes) if of_codes else 1
    codes, grid = packed.split([packed.shape[-1] - groups * group_bytes, groups * group_bytes], -1)
    if form.bits <= 4:
        codes = _unpaired(codes)
    scale = by.scale_from_bits(grid[..., : groups * by.scale_bytes])
    zero_point = None if form.symmetric else grid[..., groups * by.scale_bytes :].contiguous().view(torch.int8).float()
    return Quantized(by.from_bits(codes.view(torch.int8)), Grid(scale, zero_point))


def pack_rows(weight: Quantized, form: Format) -> Tensor:
    """Pack rows of a weight, codes [rows, n] and grid, into uint8 [bytes]: all codes, then all grids."""
    return pack(Quantized(weight.codes.flatten(), weight.grid.map(Tensor.flatten)), form)


def makes_rows(form: Format, shape: tuple[int, ...], parts: int) -> bool:
    """Return whether each of ``parts`` ranks can pack its own rows of a weight of ``shape``, and the codes replace it.

    That needs equal parts, a grid that follows from a row's values alone, to the bit, a gradient that passes
    unclipped, and codes that fit the packed bits.
    """
    if not form.quantizes or form.clips or not form.by.is_exact or form.by.learned:
        return False
    if form.code_bits > (4 if form.bits <= 4 else 8):
        return False
    return shape[0] % parts == 0 and (form.bits > 4 or (form.group_size or shape[1]) % 2 == 0)


def bytes_of_rows(form: Format, shape: tuple[int, ...]) -> int:
    """Return the bytes of ``pack_rows`` of a weight."""
    out, columns = shape
    return out * sum(_row(form, columns))


def stand_in(weight: Tensor, form: Format) -> Quantized | None:
    """Return the codes [out, in] that stand in for the values of a Parameter; None where its values are here."""
    if not _has_stand_in(weight):
        return None
    codes, scale, *zero_point = _split(weight, form)
    by, out = form.by_on(codes.device), weight.shape[0]
    if form.bits <= 4:
        codes = (_fused_unpaired if codes.is_cuda else _unpaired)(codes.squeeze(0))
    grid = Grid(by.scale_from_bits(scale.reshape(out, -1)), *(part.reshape(out, -1).float() for part in zero_point))
    return Quantized(by.from_bits(codes.view(torch.int8).reshape(out, -1)), grid)


def stand_in_values(weight: Tensor, form: Format, dtype: torch.dtype) -> Tensor | None:
    """Return the values [out, in] of ``stand_in``, of ``dtype``; None where the Parameter's own are here."""
    if not _has_stand_in(weight):
        return None
    own = kernels.on(weight.device.type)
    if own and form.by.code_dtype == torch.int8 and form.by.scale_bytes == 4:
        codes, scale, *zero_point = _split(weight, form)
        group = form.group_size or weight.shape[1]
        values = own.stored_values(codes, scale, *(zero_point or (None,)), form.bits <= 4, group, dtype)
        if values is not None:
            return values
    quantized = stand_in(weight, form)
    assert quantized is not None
    return dequantize(quantized, dtype)


def stand_in_rows(weight: Tensor, form: Format, rows: Tensor) -> Quantized | None:
    """Return the given rows [...] of ``stand_in`` alone: [..., in]."""
    if not _has_stand_in(weight):
        return None
    parts = _split(weight, form)
    in_part = parts[0].shape[1]
    own = [part[rows // in_part, rows % in_part].view(torch.uint8) for part in parts]
    return unpack(torch.cat(own, -1), form)


def _has_stand_in(weight: Tensor) -> bool:
    """Return whether codes stand in for a Parameter's values; raise RuntimeError if neither is here."""
    if hasattr(weight, STAND_IN):
        return True
    if weight.dim() == 2 and weight.stride() == (0, 0):  # one NaN for all, which is there beside codes alone
        raise RuntimeError("DeepSpeed has released a weight before its use.")
    return False


def _split(weight: Tensor, form: Format) -> list[Tensor]:
    """Return what stands in for a weight: codes, scales and, if there are any, zero points, [parts, rows, bytes]."""
    packed, (out, columns) = getattr(weight, STAND_IN), weight.shape
    (parts, width), begin, split = packed.shape, packed.storage_offset(), []
    for size in _row(form, columns):  # of all ways to make a view, this one costs the host least, by far
        split.append(packed.as_strided((parts, out // parts, size), (width, size, 1), begin))
        begin += out // parts * size
    return split if form.symmetric else [*split[:2], split[2].view(torch.int8)]


def _row(form: Format, columns: int) -> list[int]:
    """Return the bytes of a row's codes, of its scales and, if there are any, of its zero points."""
    groups = columns // (form.group_size or columns)
    sizes = [columns // 2 if form.bits <= 4 else columns, groups * form.by.scale_bytes]
    return sizes if form.symmetric else [*sizes, groups]


def _unpaired(pairs: Tensor) -> Tensor:
    """Return the codes [..., 2n], int8, of pairs in uint8 [..., n]."""
    wide = pairs.to(torch.int16, memory_format=torch.contiguous_format)
    wide.bitwise_or_(wide << 4).bitwise_and_(0x0F0F)  # a half of the pair in each byte, the low one first
    return wide.bitwise_or_((wide & 0x0808).mul_(30)).view(torch.int8)  # 8 * 30 = 0xF0: the sign in the upper half


_fused_unpaired = fused(_unpaired, kernel="unpair")
"""For GPUs: on CPUs the compiler's code for 16-bit integers is slower than torch's own."""
