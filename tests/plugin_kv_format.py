"""A KV cache format as somebody else would add it: ``--plugin plugin_kv_format --kv_format companded``."""

import torch

from qat.quant.kv_formats import KV_FORMATS
from qat.quant.kv_formats.base import BlockFormat


class Companded(BlockFormat):
    """A number is the square of its code, times the scale: the steps are finer near zero."""

    meaning = "4 bits, finer near zero, one fp16 scale per token and head"
    type = ""
    bits = 4
    low, high = -7.0, 7.0

    def codes(self, rows):
        scale = rows.abs().amax(-1, keepdim=True).half().float()
        return (7 * rows.sign() * (rows.abs() / scale.clamp(min=1e-6)).sqrt()).round(), scale

    def numbers(self, codes, *grid):
        return codes * codes.abs() / 49 * grid[0]

    def pack(self, codes, *grid):
        nibbles = (codes + 8).to(torch.uint8)
        return torch.cat([nibbles[:, ::2] | nibbles[:, 1::2] << 4, grid[0].half().view(torch.uint8)], -1)

    def unpack(self, packed):
        pairs, scale = packed[:, :-2], packed[:, -2:].contiguous().view(torch.half)
        return torch.stack([pairs & 15, pairs >> 4], -1).flatten(1).float() - 8, scale.float()


KV_FORMATS.add("companded", Companded())
