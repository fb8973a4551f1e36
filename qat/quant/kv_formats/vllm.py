"""What vLLM's caches with a scale per token and head share (vLLM 0.32, vllm/v1/attention/ops, PR 40835)."""

from typing import ClassVar

import torch
from torch import Tensor

from qat.quant.kv_formats.base import BlockFormat, KVFormat

SMALLEST_SCALE = 1e-6


class PerTokenHead(BlockFormat):
    """The base: a head is a block, and its fp32 scale, of 4 bytes, follows the codes."""

    engine = "vLLM"
    scale_bytes: ClassVar[int] = 4

    def flags(self, values: KVFormat) -> str:
        return f"--kv-cache-dtype {self.type}"

    def split(self, packed: Tensor) -> tuple[Tensor, Tensor]:
        """Return the bytes of the codes [heads, bytes], and the scale's bits [heads, 1], int32."""
        codes, scale = packed.split([packed.shape[-1] - self.scale_bytes, self.scale_bytes], -1)
        return codes, scale.contiguous().view(torch.int32)


def away(x: Tensor) -> Tensor:
    """Round half away from zero, as vLLM's kernels do: add half, and cut."""
    return torch.trunc(x + torch.where(x >= 0, 0.5, -0.5))
