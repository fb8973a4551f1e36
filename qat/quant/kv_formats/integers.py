"""``int``: integers of 2 to 8 bits on the grid of a quantizer, with fp32 scales: the paper's, and qat.load's own.

* granularity ``token_head``: one scale per token and KV head; ``token``: one per token (the paper).
* rotation ``hadamard``: Q and K after RoPE, and V, are multiplied by an orthogonal Hadamard matrix over head_dim.
  Attention scores and outputs are unchanged in exact arithmetic. The stored codes are those of the rotated K and V.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from qat.quant.hadamard import hadamard_matrix
from qat.quant.kv_formats.base import KVFormat
from qat.quant.number_format import Format, dequantize, fake_quantize, quantize
from qat.quant.packing import pack, unpack
from qat.runtime.errors import UserError


@dataclass(frozen=True)
class Integers(KVFormat):
    form: Format
    granularity: str
    rotation: str

    type = ""
    adjustable = True
    meaning = "kv_bits by kv_quantizer, kv_granularity and kv_rotation, for qat.load"

    @property
    def bits(self) -> int:  # type: ignore[override]
        return self.form.bits

    def of(self, form: Format, granularity: str, rotation: str) -> "Integers":
        return Integers(form, granularity, rotation)

    def check(self, head_dim: int) -> None:
        if (block := self.form.group_size) and head_dim % block:
            raise UserError(
                f"kv_quantizer={self.form.quantizer} has blocks of {block}, which do not divide the model's {head_dim} "
                "channels per head: give another quantizer."
            )
        if self.rotation == "hadamard" and head_dim & (head_dim - 1):
            raise UserError(
                f"kv_rotation=hadamard needs a head_dim that is a power of two; this model's is {head_dim}: "
                "give kv_rotation=none."
            )

    def queries(self, x: Tensor) -> Tensor:
        """Rotate queries, keys, values or attention outputs [..., head_dim]; rotating twice changes nothing."""
        return x if self.rotation == "none" else x @ hadamard_matrix(x.shape[-1], x.device, x.dtype)

    keys = values = outputs = queries

    def round(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return self._split(fake_quantize(self._groups(x), self.form), x.shape[1])

    def projection(self, x: Tensor, head_dim: int) -> Tensor:
        """Round the output of k_proj or v_proj [batch, tokens, kv_heads * head_dim]."""
        if self.granularity == "token":
            return fake_quantize(x, self.form)
        return fake_quantize(x.unflatten(-1, (-1, head_dim)), self.form).flatten(-2)

    def encode(self, x: Tensor) -> Tensor:
        return pack(quantize(self._groups(x), self.form), self.form)

    def decode(self, packed: Tensor, kv_heads: int, dtype: torch.dtype) -> Tensor:
        return self._split(dequantize(unpack(packed, self.form), dtype), kv_heads)

    def _groups(self, x: Tensor) -> Tensor:
        """Rearrange [batch, kv_heads, tokens, head_dim] so that the numbers sharing a scale form the last dimension:
        for ``token`` [batch, 1, tokens, kv_heads * head_dim]."""
        return x if self.granularity == "token_head" else x.transpose(1, 2).flatten(2)[:, None]

    def _split(self, groups: Tensor, kv_heads: int) -> Tensor:
        """Undo ``_groups``."""
        return (
            groups if self.granularity == "token_head" else groups[:, 0].unflatten(-1, (kv_heads, -1)).transpose(1, 2)
        )
