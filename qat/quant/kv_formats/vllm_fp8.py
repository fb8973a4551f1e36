"""vLLM's ``fp8_per_token_head``: e4m3 numbers times a scale (triton_reshape_and_cache_flash.py of vLLM 0.32)."""

from torch import Tensor

from qat.quant.kv_formats.vllm import ScaledPerTokenHead
from qat.quant.quantizers.minifloat import E4M3, E4M3_MAX, nearest_e4m3


class VllmFp8(ScaledPerTokenHead):
    type = "fp8_per_token_head"
    code_dtype = E4M3
    low, high = -E4M3_MAX, E4M3_MAX
    meaning = "vLLM's fp8_per_token_head cache: e4m3, one scale per token and head"

    def nearest(self, steps: Tensor) -> Tensor:
        return nearest_e4m3(steps)
