"""Codes and their grids as bytes: what a packed layer, and a cache of integers, hold."""

import torch
from torch import Tensor

from qat.quant.number_format import Format, Quantized
from qat.quant.quantizers.base import Grid


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
    """Unpack codes and grid: the inverse of ``pack``."""
    by = form.by_on(packed.device)
    group_bytes = by.scale_bytes + (not form.symmetric)
    of_codes = form.group_size // 2 if form.bits <= 4 else form.group_size
    groups = packed.shape[-1] // (of_codes + group_bytes) if of_codes else 1
    codes, grid = packed.split([packed.shape[-1] - groups * group_bytes, groups * group_bytes], -1)
    if form.bits <= 4:
        signed = codes.view(torch.int8)
        low, high = (signed << 4) >> 4, signed >> 4  # right shifts of int8 keep the sign
        codes = torch.stack([low, high], -1).flatten(-2)
    scale = by.scale_from_bits(grid[..., : groups * by.scale_bytes])
    zero_point = None if form.symmetric else grid[..., groups * by.scale_bytes :].contiguous().view(torch.int8).float()
    return Quantized(by.from_bits(codes.view(torch.int8)), Grid(scale, zero_point))
