"""vLLM's ``int8_per_token_head`` (triton_reshape_and_cache_flash.py of vLLM 0.32)."""

import torch
from torch import Tensor

from qat.quant.kv_formats.vllm import SMALLEST_SCALE, PerTokenHead, away
from qat.quant.quantizers.base import divided


class VllmInt8(PerTokenHead):
    type = "int8_per_token_head"
    bits = 8
    low, high = -128.0, 127.0
    meaning = "vLLM's int8_per_token_head cache: 8 bits, one scale per token and head"

    def codes(self, rows: Tensor) -> tuple[Tensor, ...]:
        scale = divided(rows.abs().amax(-1, keepdim=True), 127).clamp(min=SMALLEST_SCALE)
        return away(rows * (1 / scale)), scale

    def numbers(self, codes: Tensor, *grid: Tensor) -> Tensor:
        return codes * grid[0]

    def pack(self, codes: Tensor, *grid: Tensor) -> Tensor:
        return torch.cat([codes.to(torch.int8).view(torch.uint8), grid[0].contiguous().view(torch.uint8)], -1)

    def unpack(self, packed: Tensor) -> tuple[Tensor, ...]:
        codes, scale = self.split(packed)
        return codes.contiguous().view(torch.int8).float(), scale.view(torch.float32)
