"""KV-cache quantization, simulated inside attention while the student trains.

The keys and values that a cache would store are rounded per token before they are attended to:

* site ``post_rope``: what a cache stores; ``pre_rope``: the outputs of k_proj and v_proj, as in the
  paper's released code.
* format: how numbers are rotated, rounded and stored, see qat.quant.kv_formats.

``qat.infer.integer_cache`` stores for real what is simulated here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from qat.quant.kv_formats import KVFormat

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ATTENTION = "qat_sdpa"
"""The name under which ``quantized_attention`` is registered with transformers."""


class Stored(NamedTuple):
    """Keys or values [batch, kv_heads, tokens, head_dim] as an IntegerCache reads them: rotated and on their grid.

    It is not a Tensor, so that none can be taken for one that is still to be rotated: transformers passes it on from
    the cache to ``quantized_attention``, and code between them that computed with it would fail.
    """

    tensor: Tensor


class KVQuantizer:
    """The KV quantization of one attention layer: what is multiplied, and what is stored.

    Args:
        keys, values: their formats
        interleaves: whether a format that ``reorders`` stores the channels of queries and keys in llama.cpp's order:
            neighbours are those that transformers has half a head apart
    """

    def __init__(self, keys: KVFormat, values: KVFormat, interleaves: bool = False):
        self.keys, self.values, self.interleaves = keys, values, interleaves and keys.reorders

    def query(self, x: Tensor) -> Tensor:
        """Return queries [batch, heads, tokens, head_dim] as they are multiplied with stored keys."""
        return self.keys.queries(self._ordered(x))

    def key(self, x: Tensor | Stored) -> Tensor:
        """Return keys [batch, kv_heads, tokens, head_dim] as they are read."""
        if isinstance(x, Stored):
            return x.tensor
        return self.keys.round(self.keys.keys(self._ordered(x)), x.dtype)

    def value(self, x: Tensor | Stored) -> Tensor:
        """Return values [batch, kv_heads, tokens, head_dim] as they are read."""
        if isinstance(x, Stored):
            return x.tensor
        return self.values.round(self.values.values(x), x.dtype)

    def output(self, x: Tensor) -> Tensor:
        """Rotate attention's output over stored values [batch, tokens, heads, head_dim] back."""
        return self.values.outputs(x)

    def encode_key(self, x: Tensor) -> Tensor:
        """Return the bytes, uint8 [batch, groups, tokens, bytes], of keys."""
        return self.keys.encode(self.keys.keys(self._ordered(x)))

    def encode_value(self, x: Tensor) -> Tensor:
        """Return the bytes, uint8 [batch, groups, tokens, bytes], of values."""
        return self.values.encode(self.values.values(x))

    def _ordered(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2) if self.interleaves else x


class KVRecorder(KVQuantizer):
    """Takes the place of a KVQuantizer in a full-precision model: it quantizes nothing, and calls ``note`` with "keys"
    or "values" and what a cache would store [batch, kv_heads, tokens, head_dim]."""

    def __init__(self, keys: KVFormat, values: KVFormat, interleaves: bool, note: Callable[[str, Tensor], None]):
        super().__init__(keys, values, interleaves)
        self._note = note

    def query(self, x: Tensor) -> Tensor:
        return x

    def key(self, x: Tensor) -> Tensor:  # type: ignore[override]
        self._note("keys", self.keys.keys(self._ordered(x)))
        return x

    def value(self, x: Tensor) -> Tensor:  # type: ignore[override]
        self._note("values", self.values.values(x))
        return x

    def output(self, x: Tensor) -> Tensor:
        return x


def kv_quantizers(model: nn.Module) -> dict[str, KVQuantizer]:
    """Return the KVQuantizer of each attention module that has one, by the module's name."""
    return {name: module.kv_quantizer for name, module in model.named_modules() if hasattr(module, "kv_quantizer")}


class AttentionRecord:
    """Collects (query, key, scaling, window) of each layer's attention, as its scores are computed from them.

    Queries are [batch, heads, tokens, head_dim], keys [batch, kv_heads, tokens, head_dim]; of the tokens before it, a
    token sees the last ``window`` ones, itself included, or all if that is None.
    """

    def __init__(self) -> None:
        self.layers: dict[int, tuple[Tensor, Tensor, float, int | None]] = {}

    def split(self, lengths: tuple[int, ...]) -> list[AttentionRecord]:
        """Return a record for each of the packed sequences of ``lengths`` tokens."""
        records = [AttentionRecord() for _ in lengths]
        for layer, (query, key, scaling, window) in self.layers.items():
            parts = zip(records, query.split(lengths, 2), key.split(lengths, 2), strict=True)
            for record, own_query, own_key in parts:
                record.layers[layer] = own_query, own_key, scaling, window
        return records


def attend(model: PreTrainedModel) -> None:
    """Make ``model`` attend by ``quantized_attention``, if it does not yet. The mask function is registered under the
    same name, or the mask would be dropped."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    if model.config._attn_implementation == ATTENTION:
        return
    AttentionInterface.register(ATTENTION, quantized_attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    model.set_attn_implementation(ATTENTION)


def quantized_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    attention_record: AttentionRecord | None = None,
    sequence_lengths: tuple[int, ...] = (),
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute scaled dot-product attention over quantized keys and values, with transformers' signature: queries
    [batch, heads, tokens, head_dim] attend to keys and values [batch, kv_heads, columns, head_dim], where ``columns``
    counts the tokens of the cache too; the output is [batch, tokens, heads, head_dim].

    A layer without ``kv_quantizer`` attends in full precision. Keys and values that come out of an IntegerCache are
    ``Stored``. Of the packed sequences of ``sequence_lengths`` tokens each attends to itself alone; no scores of one
    with another are computed.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    kv: KVQuantizer | None = getattr(module, "kv_quantizer", None)
    if kv is not None:
        query, key, value = kv.query(query), kv.key(key), kv.value(value)
    if attention_record is not None and module.layer_idx not in attention_record.layers:  # not again in a recomputation
        attention_record.layers[module.layer_idx] = query, key, scaling, kwargs.get("sliding_window")  # type: ignore[index]
    if sequence_lengths:
        window = kwargs.get("sliding_window")
        parts = zip(*(x.split(sequence_lengths, 2) for x in (query, key, value)), strict=True)
        outputs = [
            sdpa_attention_forward(module, q, k, v, _window_mask(q, window), scaling=scaling, **kwargs)[0]
            for q, k, v in parts
        ]
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)
    else:
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    return output if kv is None else kv.output(output), None


def _window_mask(query: Tensor, window: int | None) -> Tensor | None:
    """Return the mask [1, 1, tokens, tokens] by which each token of one sequence sees the last ``window``, itself
    included; None where that is all before it, which needs no mask."""
    tokens = query.shape[2]
    if window is None or tokens <= window:
        return None
    seen = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device)
    return seen.tril().triu(1 - window)[None, None]
