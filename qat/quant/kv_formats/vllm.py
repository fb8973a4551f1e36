"""The common base of vLLM's caches, and the base of those with a scale per token and head (vLLM 0.32,
vllm/v1/attention/ops, PR 40835)."""

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from qat.quant.kv_formats.base import BlockFormat, KVFormat
from qat.quant.quantizers.base import divided

SMALLEST_SCALE = 1e-6


class Vllm(KVFormat):
    """A cache that one flag of vLLM's names."""

    engine = "vLLM"

    def flags(self, values: KVFormat) -> str:
        return f"--kv-cache-dtype {self.type}"


class VllmFormat(Vllm, BlockFormat):
    """Such a cache whose blocks have grids of their own, or none."""


class PerTokenHead(VllmFormat):
    """A head is a block, and its fp32 scale, of 4 bytes, follows the codes."""

    scale_bytes: ClassVar[int] = 4

    def split(self, packed: Tensor) -> tuple[Tensor, Tensor]:
        """Return the bytes of the codes [heads, bytes], and the scale's bits [heads, 1], int32."""
        codes, scale = packed.split([packed.shape[-1] - self.scale_bytes, self.scale_bytes], -1)
        return codes, scale.contiguous().view(torch.int32)


class ScaledPerTokenHead(PerTokenHead):
    """A format of 8 bits whose numbers are codes times the scale.

    Attributes:
        code_dtype: the dtype in which codes are stored
        high: the code of a head's largest magnitude
    """

    bits = 8
    served = "GPUs divide less exactly, and round the softmax weights times the scale of the values"
    code_dtype: ClassVar[torch.dtype]

    @abstractmethod
    def nearest(self, steps: Tensor) -> Tensor:
        """Return the codes [heads, head_dim], in fp32, of numbers that are given in scales."""

    def codes(self, rows: Tensor) -> tuple[Tensor, ...]:
        scale = divided(rows.abs().amax(-1, keepdim=True), int(self.high)).clamp(min=SMALLEST_SCALE)
        return self.nearest(rows * (1 / scale)), scale

    def numbers(self, codes: Tensor, *grid: Tensor) -> Tensor:
        return codes * grid[0]

    def pack(self, codes: Tensor, *grid: Tensor) -> Tensor:
        return torch.cat([codes.to(self.code_dtype).view(torch.uint8), grid[0].contiguous().view(torch.uint8)], -1)

    def unpack(self, packed: Tensor) -> tuple[Tensor, ...]:
        codes, scale = self.split(packed)
        return codes.contiguous().view(self.code_dtype).float(), scale.view(torch.float32)


def away(x: Tensor) -> Tensor:
    """Round x [...] half away from zero, as vLLM's kernels do: add half, and cut."""
    return torch.trunc(x + torch.where(x >= 0, 0.5, -0.5))
