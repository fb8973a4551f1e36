"""llama.cpp's KV cache: ggml's blocks of 32 channels with an fp16 scale, after a Hadamard rotation.

The rules are those of ggml-quants.c and of the CPU engine, build_attn in llama-graph.cpp (llama.cpp 0.6.0-dev of
xllamacpp 2026.10.11549):

* Queries, keys and values are rotated in fp32, if head_dim is a multiple of 64: queries and keys in pieces of the
  largest 64 * 2^i that divides it, values in pieces of 64. The heads of LLaMA's keys and queries are in the order of
  llama.cpp's own copy of the weights.
* Codes are made with the fp32 scale, and read with the scale that is stored, which is fp16.
* Queries are rounded to 8 bits in blocks of 32. (Prompts on CUDA are not: there queries are fp16.)
* Attention reads the cache for the current tokens too.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from qat.quant.hadamard import largest_power_of_two
from qat.quant.kv_formats.base import BlockFormat, KVFormat
from qat.quant.kv_formats.butterflies import butterflies
from qat.quant.quantizers.base import divided
from qat.runtime.errors import UserError

_BLOCK = 32
_PIECE = 64
_SMALLEST = 1e-36
"""Scales below this have no reciprocal in fp32; in fp16 they are 0."""


class Ggml(BlockFormat):
    """The base: what is the same for all types."""

    engine = "llama.cpp"
    pairs = True
    reorders = True
    block = _BLOCK
    type: str
    low = 0.0
    parts: ClassVar[int] = 1

    @property
    def meaning(self) -> str:
        return f"llama.cpp's {self.type} cache, {self.stored_bits(_BLOCK):g} bits with the scales"

    @property
    def high(self) -> float:  # type: ignore[override]
        return 2.0**self.bits - 1

    @property
    def block_bytes(self) -> int:
        return 2 * self.parts + _BLOCK * self.bits // 8

    def flags(self, values: KVFormat) -> str:
        return f"-ctk {self.type} -ctv {values.type} -fa on"

    def check(self, head_dim: int) -> None:
        if head_dim % _BLOCK:
            raise UserError(
                f"kv_format=ggml_{self.type} has blocks of {_BLOCK} channels, and this model's heads have {head_dim}: "
                "give kv_format=int."
            )

    def queries(self, x: Tensor) -> Tensor:
        return Q8_0().round(self.keys(x), x.dtype)

    def keys(self, x: Tensor) -> Tensor:
        return _rotate(x, largest_power_of_two(x.shape[-1]))

    def values(self, x: Tensor) -> Tensor:
        return _rotate(x, _PIECE)

    def outputs(self, x: Tensor) -> Tensor:
        return _rotate(x, _PIECE).to(x.dtype)

    def pack(self, codes: Tensor, *grid: Tensor) -> Tensor:
        found = [part.half().view(torch.uint8) for part in grid]
        if self.bits == 8:
            return torch.cat([*found, codes.to(torch.int8).view(torch.uint8)], -1)
        codes = codes.to(torch.uint8)
        if self.bits == 5:
            places = 1 << torch.arange(8, dtype=torch.uint8, device=codes.device)
            found.append(((codes >> 4).unflatten(-1, (-1, 8)) * places).sum(-1, dtype=torch.uint8))
        first, second = (codes & 15).chunk(2, -1)
        return torch.cat([*found, first | second << 4], -1)

    def unpack(self, packed: Tensor) -> tuple[Tensor, ...]:
        grid, codes = packed.split([2 * self.parts, packed.shape[-1] - 2 * self.parts], -1)
        parts = grid.contiguous().view(torch.float16).float().split(1, -1)
        if self.bits == 8:
            return codes.view(torch.int8).float(), *parts
        nibbles = codes[:, -_BLOCK // 2 :]
        found = torch.cat([nibbles & 15, nibbles >> 4], -1)
        if self.bits == 5:
            places = torch.arange(8, dtype=torch.uint8, device=codes.device)
            found = found | ((codes[:, :4, None] >> places) & 1).flatten(1) << 4
        return found.float(), *parts


def _rotate(x: Tensor, size: int) -> Tensor:
    """Rotate x [..., head_dim], in fp32, in pieces of ``size`` channels; not at all if head_dim has no piece of 64."""
    return x if x.shape[-1] % _PIECE else butterflies(x, size, size**-0.5)


def _reciprocal(scale: Tensor) -> Tensor:
    return torch.where(scale.abs() < _SMALLEST, 0.0, 1 / scale)


def _as_stored(scale: Tensor) -> Tensor:
    return scale.half().float()


@dataclass(frozen=True)
class Q8_0(Ggml):
    """Symmetric: scale = max|x| / 127, half to even."""

    type: str = "q8_0"
    bits: int = 8
    low = -127.0
    high = 127.0

    def codes(self, rows: Tensor) -> tuple[Tensor, ...]:
        largest = rows.abs().amax(-1, keepdim=True)
        # As on x86, where others take one over the scale. Of a number and a tensor, torch would take the reciprocal.
        per_unit = torch.where(largest < _SMALLEST, 0.0, torch.full_like(largest, 127) / largest)
        return torch.round(rows * per_unit), _as_stored(divided(largest, 127))

    def numbers(self, codes: Tensor, *grid: Tensor) -> Tensor:
        return codes * grid[0]


@dataclass(frozen=True)
class Signed(Ggml):
    """q4_0, q5_0: the element of largest magnitude, with its sign, is the first code exactly; elements of the other
    sign beyond half a step after the last code are clipped."""

    type: str
    bits: int
    clips = True

    def codes(self, rows: Tensor) -> tuple[Tensor, ...]:
        half = 2 ** (self.bits - 1)
        extreme = rows.gather(-1, rows.abs().argmax(-1, keepdim=True))
        scale = extreme / -half
        return torch.trunc(rows * _reciprocal(scale) + (half + 0.5)), _as_stored(scale)

    def numbers(self, codes: Tensor, *grid: Tensor) -> Tensor:
        return (codes - 2 ** (self.bits - 1)) * grid[0]


@dataclass(frozen=True)
class Minimum(Ggml):
    """q4_1, q5_1: the codes count steps above the least element, which is stored beside the scale."""

    type: str
    bits: int
    parts = 2

    def codes(self, rows: Tensor) -> tuple[Tensor, ...]:
        least, most = rows.amin(-1, keepdim=True), rows.amax(-1, keepdim=True)
        scale = divided(most - least, 2**self.bits - 1)
        codes = torch.trunc((rows - least) * _reciprocal(scale) + 0.5)
        return codes, _as_stored(scale), _as_stored(least)

    def numbers(self, codes: Tensor, *grid: Tensor) -> Tensor:
        return codes * grid[0] + grid[1]


_TABLE = (-127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0)
_BEYOND = 125.0
"""Half a step after the last code: what is above it was clipped."""


@dataclass(frozen=True)
class Iq4Nl(Ggml):
    """iq4_nl: a code is a place in a table; the scale is fitted to the codes by least squares, weighted by x^2."""

    type: str = "iq4_nl"
    bits: int = 4
    clips = True

    def codes(self, rows: Tensor) -> tuple[Tensor, ...]:
        extreme = rows.gather(-1, rows.abs().argmax(-1, keepdim=True))
        scaled = rows * _reciprocal(divided(extreme, -127))
        codes = torch.zeros_like(rows)
        for below, above in pairwise(_TABLE):
            codes = codes + (scaled - below >= above - scaled)
        weight = rows * rows * self._in_table(codes)
        along, square = torch.zeros_like(extreme), torch.zeros_like(extreme)
        for place in range(_BLOCK):  # in ggml's order: a sum has other last bits in another one
            one = slice(place, place + 1)
            along = along + weight[:, one] * rows[:, one]
            square = square + weight[:, one] * self._in_table(codes[:, one])
        scale = torch.where(square == 0, 0.0, along / square)
        return codes + (scaled > _BEYOND), _as_stored(scale)

    def numbers(self, codes: Tensor, *grid: Tensor) -> Tensor:
        return self._in_table(codes) * grid[0]

    @staticmethod
    def _in_table(codes: Tensor) -> Tensor:
        found = torch.full_like(codes, _TABLE[0])
        for place, (below, above) in enumerate(pairwise(_TABLE)):
            found = found + (codes > place) * (above - below)
        return found
