"""vLLM's ``fp8_per_token_head``: e4m3 numbers times a scale (triton_reshape_and_cache_flash.py of vLLM 0.32)."""

import torch
from torch import Tensor

from qat.quant.kv_formats.vllm import SMALLEST_SCALE, PerTokenHead
from qat.quant.quantizers.base import divided
from qat.quant.quantizers.minifloat import nearest_e4m3

_E4M3 = torch.float8_e4m3fn


class VllmFp8(PerTokenHead):
    type = "fp8_per_token_head"
    bits = 8
    high = torch.finfo(_E4M3).max
    low = -high
    meaning = "vLLM's fp8_per_token_head cache: e4m3, one scale per token and head"

    def codes(self, rows: Tensor) -> tuple[Tensor, ...]:
        scale = divided(rows.abs().amax(-1, keepdim=True), 448).clamp(min=SMALLEST_SCALE)
        return nearest_e4m3(rows * (1 / scale)), scale

    def numbers(self, codes: Tensor, *grid: Tensor) -> Tensor:
        return codes * grid[0]

    def pack(self, codes: Tensor, *grid: Tensor) -> Tensor:
        return torch.cat([codes.to(_E4M3).view(torch.uint8), grid[0].contiguous().view(torch.uint8)], -1)

    def unpack(self, packed: Tensor) -> tuple[Tensor, ...]:
        codes, scale = self.split(packed)
        return codes.contiguous().view(_E4M3).float(), scale.view(torch.float32)
