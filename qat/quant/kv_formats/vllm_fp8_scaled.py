"""vLLM's ``fp8`` cache with scales in the checkpoint (``k_scale``, ``v_scale``): e4m3 numbers times one scale for all
keys of a layer, and one for all its values.

The scales are measured before training, with room for twice the values; larger ones are clipped. They are powers of
two, as those of ``fp8_tensor``: dividing by a scale and multiplying by its inverse give the same codes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from qat.quant.kv_formats.tensor_scaled import TensorScaled
from qat.quant.kv_formats.vllm import Vllm
from qat.quant.number_format import Quantized, dequantize, grid_of, quantize
from qat.quant.quantizers.base import FloatFormat
from qat.quant.quantizers.minifloat import E4M3


@dataclass(frozen=True)
class VllmFp8Scaled(Vllm, TensorScaled):
    type = "fp8"
    float_format = FloatFormat.FP8_TENSOR
    served = "FlashAttention 3 rounds queries to FP8 too; CPUs need AVX-512, and cut off where training rounds"
    meaning = "vLLM's fp8 cache: e4m3, one scale per layer for keys and one for values, measured before training"

    def encode(self, x: Tensor) -> Tensor:
        return quantize(x, self.form).codes.view(torch.uint8)

    def decode(self, packed: Tensor, kv_heads: int, dtype: torch.dtype) -> Tensor:
        return dequantize(Quantized(packed.view(E4M3), grid_of(packed, self.form)), dtype)
