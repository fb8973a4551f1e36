"""The KV cache as integers: the codes and scales that ``qat.quant.kv_cache`` simulates, stored for ``generate``.

``model.generate(..., past_key_values=IntegerCache(model))`` decodes as the full forward pass of the
fake-quantized model does.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from qat.quant.architecture import attentions
from qat.quant.kv_cache import KVQuantizer, mark_stored
from qat.quant.number_format import Format, Quantized, dequantize, quantize
from qat.quant.quantizers.base import Grid
from qat.runtime.errors import UserError


class IntegerCache(Cache):
    """A cache with one IntegerLayer for each decoder layer of ``model``, which must be prepared with a quantized KV
    cache.

    Layers with kv_bits=16 among others keep transformers' own cache. Raises UserError if no layer's KV cache is
    quantized, or all are where a cache cannot store it (before RoPE).
    """

    def __init__(self, model: PreTrainedModel):
        quantizers = [getattr(attention, "kv_quantizer", None) for attention in attentions(model)]
        if not any(quantizers):
            raise UserError(
                "An integer KV cache needs a model with kv_bits below 16 and kv_site=post_rope: a cache stores the "
                "keys after RoPE."
            )
        super().__init__(layers=[IntegerLayer(own) if own else DynamicLayer() for own in quantizers])

    def nbytes(self) -> int:
        """Return the bytes of the cache in memory, scales included."""
        held = [part for layer in self.layers for part in (layer.keys, layer.values)]  # type: ignore[union-attr]
        return sum(part.nbytes for part in held if part is not None)


class IntegerLayer(DynamicLayer):
    """Keys and values of one layer as bytes: uint8 [batch, groups, tokens, bytes]; see ``pack``.

    Everything that transformers does with a cache (growing, cropping, reordering for beams) happens to the bytes.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, quantizer: KVQuantizer):
        super().__init__()
        self.quantizer = quantizer

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = torch.empty(0, dtype=torch.uint8, device=self.device)
        self.values = torch.empty(0, dtype=torch.uint8, device=self.device)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values [batch, kv_heads, new, head_dim]; return all of them, rotated and on their grid."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = torch.cat([self.keys, self._store(key_states)], -2)
        self.values = torch.cat([self.values, self._store(value_states)], -2)
        return self._load(self.keys, key_states), self._load(self.values, value_states)

    def _store(self, x: Tensor) -> Tensor:
        return pack(quantize(self.quantizer.groups(self.quantizer.rotate(x)), self.quantizer.form), self.quantizer.form)

    def _load(self, packed: Tensor, like: Tensor) -> Tensor:
        values = dequantize(unpack(packed, self.quantizer.form), like.dtype)
        return mark_stored(self.quantizer.split(values, like.shape[1]))


def pack(quantized: Quantized, form: Format) -> Tensor:
    """Pack codes [..., n] and their grid into uint8 [..., bytes]: the codes (two per byte up to 4 bits), then scales
    (fp32, but for formats that round them), then the zero points if the format has them."""
    codes, (scale, zero_point) = quantized
    by = form.by_on(codes.device)
    packed = by.to_bits(codes).view(torch.uint8)
    if form.bits <= 4:
        packed = (packed[..., 0::2] & 15) | (packed[..., 1::2] << 4)
    parts = [packed, by.scale_to_bits(scale)]
    if zero_point is not None:
        parts.append(zero_point.to(torch.int8).view(torch.uint8))
    return torch.cat(parts, -1)


def unpack(packed: Tensor, form: Format) -> Quantized:
    """Unpack codes and grid: the inverse of ``pack``."""
    by = form.by_on(packed.device)
    group_bytes = by.scale_bytes + (not form.symmetric)
    of_codes = form.group_size // 2 if form.bits <= 4 else form.group_size
    groups = packed.shape[-1] // (of_codes + group_bytes) if of_codes else 1
    codes, grid = packed.split([packed.shape[-1] - groups * group_bytes, groups * group_bytes], -1)
    if form.bits <= 4:
        signed = codes.view(torch.int8)
        low, high = (signed << 4) >> 4, signed >> 4  # right shifts of int8 keep the sign
        codes = torch.stack([low, high], -1).flatten(-2)
    scale = by.scale_from_bits(grid[..., : groups * by.scale_bytes])
    zero_point = None if form.symmetric else grid[..., groups * by.scale_bytes :].contiguous().view(torch.int8).float()
    return Quantized(by.from_bits(codes.view(torch.int8)), Grid(scale, zero_point))
