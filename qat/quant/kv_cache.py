"""KV-cache quantization, simulated inside attention while the student trains.

The keys and values that a cache would store are rounded per token before they are attended to:

* site ``post_rope``: what a cache stores; ``pre_rope``: the outputs of k_proj and v_proj, as in the
  paper's released code.
* granularity ``token_head``: one scale per token and KV head; ``token``: one per token (the paper).
* rotation ``hadamard``: Q and K after RoPE, and V, are multiplied by an orthogonal Hadamard matrix
  over head_dim, which spreads the outlier channels of K. Attention scores and outputs are unchanged
  in exact arithmetic, and no data is needed. The stored codes are those of the rotated K and V.

``qat.infer.integer_cache`` stores for real what is simulated here.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from qat.quant.hadamard import hadamard_matrix
from qat.quant.number_format import Format, fake_quantize

ATTENTION = "qat_sdpa"
"""The name under which ``quantized_attention`` is registered with transformers."""


class KVQuantizer:
    """The KV quantization of one attention layer."""

    def __init__(self, form: Format, granularity: str, rotation: str):
        self.form, self.granularity, self.rotation = form, granularity, rotation

    def heads(self, x: Tensor) -> Tensor:
        """Round keys or values [batch, kv_heads, tokens, head_dim]."""
        return self.split(fake_quantize(self.groups(x), self.form), x.shape[1])

    def projection(self, x: Tensor, head_dim: int) -> Tensor:
        """Round the output of k_proj or v_proj [batch, tokens, kv_heads * head_dim]."""
        if self.granularity == "token":
            return fake_quantize(x, self.form)
        return fake_quantize(x.unflatten(-1, (-1, head_dim)), self.form).flatten(-2)

    def groups(self, x: Tensor) -> Tensor:
        """Rearrange [batch, kv_heads, tokens, head_dim] so that the numbers sharing a scale form the last dimension:
        for ``token`` [batch, 1, tokens, kv_heads * head_dim]."""
        return x if self.granularity == "token_head" else x.transpose(1, 2).flatten(2)[:, None]

    def split(self, groups: Tensor, kv_heads: int) -> Tensor:
        """Undo ``groups``."""
        return (
            groups if self.granularity == "token_head" else groups[:, 0].unflatten(-1, (kv_heads, -1)).transpose(1, 2)
        )

    def rotate(self, x: Tensor) -> Tensor:
        """Rotate queries, keys, values or attention outputs [..., head_dim]; rotating twice changes nothing."""
        return x if self.rotation == "none" else x @ hadamard_matrix(x.shape[-1], x.device, x.dtype)


class AttentionRecord:
    """Collects (query, key, scaling, window) of each layer's attention, as its scores are computed from them.

    Queries are [batch, heads, tokens, head_dim], keys [batch, kv_heads, tokens, head_dim]; of the tokens before it, a
    token sees the last ``window`` ones, itself included, or all if that is None.
    """

    def __init__(self) -> None:
        self.layers: dict[int, tuple[Tensor, Tensor, float, int | None]] = {}

    def split(self, lengths: tuple[int, ...]) -> "list[AttentionRecord]":
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
    """Compute scaled dot-product attention over quantized keys and values, with transformers' signature.

    A layer without ``kv_quantizer`` attends in full precision. Keys and values that come out of an IntegerCache
    are rotated and on their grid already. Of the packed sequences of ``sequence_lengths`` tokens each attends to itself
    alone; no scores of one with another are computed.
    """
    kv: KVQuantizer | None = getattr(module, "kv_quantizer", None)
    if kv is not None:
        query = kv.rotate(query)
        if not is_stored(key):
            key, value = kv.heads(kv.rotate(key)), kv.heads(kv.rotate(value))
    if attention_record is not None:
        attention_record.layers[module.layer_idx] = query, key, scaling, kwargs.get("sliding_window")  # type: ignore[index]
    if sequence_lengths:
        window = kwargs.get("sliding_window")
        parts = zip(*(x.split(sequence_lengths, 2) for x in (query, key, value)), strict=True)
        outputs = [
            sdpa_attention_forward(module, q, k, v, _window_mask(q, window), scaling=scaling, **kwargs)[0]
            for q, k, v in parts
        ]
        output = torch.cat(outputs, 1)
    else:
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    return output if kv is None else kv.rotate(output), None


def _window_mask(query: Tensor, window: int | None) -> Tensor | None:
    """Return the mask [1, 1, tokens, tokens] by which each token of one sequence sees the last ``window``, itself
    included; None where that is all before it, which needs no mask."""
    tokens = query.shape[2]
    if window is None or tokens <= window:
        return None
    seen = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device)
    return seen.tril().triu(1 - window)[None, None]


def mark_stored(x: Tensor) -> Tensor:
    """Mark keys or values as coming from an IntegerCache; transformers passes the tensor objects on unchanged."""
    x.stored_on_grid = True  # type: ignore[attr-defined]
    return x


def is_stored(x: Tensor) -> bool:
    return getattr(x, "stored_on_grid", False)
