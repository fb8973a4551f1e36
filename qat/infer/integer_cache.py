"""The KV cache as bytes: what ``qat.quant.kv_cache`` simulates, stored in its format for ``generate``.

``model.generate(..., past_key_values=IntegerCache(model))`` decodes as the full forward pass of the
fake-quantized model does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from qat.quant.architecture import attentions
from qat.quant.kv_cache import KVQuantizer, Stored
from qat.runtime.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class IntegerCache(Cache):
    """A cache with one IntegerLayer for each decoder layer of ``model``, which must be prepared with a quantized KV
    cache.

    Layers with kv_bits=16 among others keep transformers' own cache. Raises UserError if no layer's KV cache is
    quantized, or all are where a cache cannot store it (before RoPE).
    """

    def __init__(self, model: PreTrainedModel):
        quantizers = [getattr(attention, "kv_quantizer", None) for attention in attentions(model).values()]
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
    """Keys and values of one layer as bytes: uint8 [batch, groups, tokens, bytes]; see ``KVFormat.encode``.

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

    def update(  # type: ignore[override]
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Stored, Stored]:
        """Append keys and values [batch, kv_heads, new, head_dim]; return all of them, for
        ``quantized_attention``."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = torch.cat([self.keys, self.quantizer.encode_key(key_states)], -2)
        self.values = torch.cat([self.values, self.quantizer.encode_value(value_states)], -2)
        heads, dtype = key_states.shape[1], key_states.dtype
        keys = self.quantizer.keys.decode(self.keys, heads, dtype)
        return Stored(keys), Stored(self.quantizer.values.decode(self.values, heads, dtype))
