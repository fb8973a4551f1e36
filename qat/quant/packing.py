"""Codes and their grids as bytes: what a packed layer, and a cache of integers, hold."""

import torch
from torch import Tensor

from qat.quant.number_format import Format, Quantized
from qat.quant.quantizers.base import Grid

_SCALE_BYTES = 4


def pack(quantized: Quantized, form: Format) -> Tensor:
    """Pack codes [..., n] with one scale per row into uint8 [..., bytes]: the codes (two per byte up to 4 bits), then
    the fp32 scale, then the zero point if the format has one."""
    codes, (scale, zero_point) = quantized
    packed = codes.view(torch.uint8)
    if form.bits <= 4:
        packed = (packed[..., 0::2] & 15) | (packed[..., 1::2] << 4)
    parts = [packed, scale.contiguous().view(torch.uint8)]
    if zero_point is not None:
        parts.append(zero_point.to(torch.int8).view(torch.uint8))
    return torch.cat(parts, -1)


def unpack(packed: Tensor, form: Format) -> Quantized:
    """Unpack codes and grid: the inverse of ``pack``."""
    grid_bytes = _SCALE_BYTES + (not form.symmetric)
    codes, grid = packed.split([packed.shape[-1] - grid_bytes, grid_bytes], -1)
    if form.bits <= 4:
        signed = codes.view(torch.int8)
        low, high = (signed << 4) >> 4, signed >> 4  # right shifts of int8 keep the sign
        codes = torch.stack([low, high], -1).flatten(-2)
    scale = grid[..., :_SCALE_BYTES].contiguous().view(torch.float32)
    zero_point = None if form.symmetric else grid[..., _SCALE_BYTES:].contiguous().view(torch.int8).float()
    return Quantized(codes.view(torch.int8), Grid(scale, zero_point))
