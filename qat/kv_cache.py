"""KV-cache quantization, simulated inside attention while the student trains.

The keys and values that a cache would store are rounded per token before they are attended to:

* site ``post_rope``: what a cache stores; ``pre_rope``: the outputs of k_proj and v_proj, as in the
  paper's released code.
* granularity ``token_head``: one scale per token and KV head; ``token``: one per token (the paper).
* rotation ``hadamard``: Q and K after RoPE, and V, are multiplied by an orthogonal Hadamard matrix
  over head_dim, which spreads the outlier channels of K. Attention scores and outputs are unchanged
  in exact arithmetic, and no data is needed. The stored codes are those of the rotated K and V.
"""

from functools import cache

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from qat.quantizers import fake_quantize

ATTENTION = "qat_sdpa"
"""The name under which ``quantized_attention`` is registered with transformers."""


class KVQuantizer:
    """The KV format of one attention layer."""

    def __init__(self, bits: int, granularity: str, rotation: str):
        self.bits, self.granularity, self.rotation = bits, granularity, rotation

    def heads(self, x: Tensor) -> Tensor:
        """Round keys or values [batch, kv_heads, tokens, head_dim]."""
        if self.granularity == "token_head":
            return fake_quantize(x, self.bits)
        tokens_first = x.transpose(1, 2)
        return fake_quantize(tokens_first.flatten(2), self.bits).view_as(tokens_first).transpose(1, 2)

    def projection(self, x: Tensor, head_dim: int) -> Tensor:
        """Round the output of k_proj or v_proj [batch, tokens, kv_heads * head_dim]."""
        if self.granularity == "token":
            return fake_quantize(x, self.bits)
        return fake_quantize(x.unflatten(-1, (-1, head_dim)), self.bits).flatten(-2)


def register() -> None:
    """Make the attention known to transformers; its mask goes with it, or it would be dropped."""
    AttentionInterface.register(ATTENTION, quantized_attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def quantized_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs
) -> tuple[Tensor, None]:
    """Scaled dot-product attention over quantized keys and values, in transformers' attention signature."""
    kv: KVQuantizer = module.kv_quantizer  # type: ignore[assignment]
    if kv.rotation == "none":
        key, value = kv.heads(key), kv.heads(value)
    else:
        hadamard = hadamard_matrix(key.shape[-1], key.device, key.dtype)
        query = query @ hadamard
        key = kv.heads(key @ hadamard)
        value = kv.heads(value @ hadamard) @ hadamard  # symmetric and orthogonal: its own inverse
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


@cache
@torch.inference_mode(False)  # it is kept: what evaluation builds must serve training too
def hadamard_matrix(size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Sylvester's Hadamard matrix over sqrt(size): symmetric and orthogonal; size is a power of two."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    assert len(matrix) == size, f"{size} is not a power of two"
    return (matrix / size**0.5).to(device, dtype)
