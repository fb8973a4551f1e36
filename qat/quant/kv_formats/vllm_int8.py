"""vLLM's ``int8_per_token_head`` (triton_reshape_and_cache_flash.py of vLLM 0.32)."""

import torch
from torch import Tensor

from qat.quant.kv_formats.vllm import ScaledPerTokenHead, away


class VllmInt8(ScaledPerTokenHead):
    type = "int8_per_token_head"
    code_dtype = torch.int8
    low, high = -128.0, 127.0
    meaning = "vLLM's int8_per_token_head cache: 8 bits, one scale per token and head"

    def nearest(self, steps: Tensor) -> Tensor:
        return away(steps)
