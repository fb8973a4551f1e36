"""QuantEmbedding: an embedding that keeps its Parameter, and rounds the rows that it looks up.

The class of an existing ``nn.Embedding`` is swapped, as that of a Linear (qat.quant.linear): names, Parameters and
state dicts stay what they were. Every group that shares a scale lies within a row, so the rows that no token asks for
need no rounding. The gradient is straight-through. An output layer with the same Parameter rounds it to the same
values. Where ZeRO-3 gathers codes instead of values (qat.train.code_gather), the rows come from these.
"""

from typing import Any

import torch
from torch import Tensor, nn

from qat.quant.number_format import Format, Quantized, dequantize, fake_quantize, quantize
from qat.quant.packing import stand_in_rows
from qat.runtime.errors import UserError


class QuantEmbedding(nn.Embedding):
    """``y = w_hat[ids]``: each row of w on its own grid.

    Attributes:
        weight_format: how the weight is quantized
        frozen: whether the Parameter holds values that are on their grid already, and stay there
    """

    weight_format: Format
    frozen: bool

    @classmethod
    def convert(cls, embedding: nn.Module, weight: Format) -> "QuantEmbedding":
        """Turn ``embedding`` into a QuantEmbedding in place; raise UserError for one that does more than look up."""
        if type(embedding) is not nn.Embedding:
            raise UserError(
                f"The model's embedding is a {type(embedding).__name__}, and only a plain lookup can be quantized: "
                "leave it in 16 bits."
            )
        embedding.__class__ = cls
        assert isinstance(embedding, cls)
        embedding.weight_format, embedding.frozen = weight, False
        return embedding

    def forward(self, ids: Tensor) -> Tensor:
        """Return the rounded rows [..., hidden] of token ids [...]."""
        rows = super().forward(ids)
        if (codes := stand_in_rows(self.weight, self.weight_format, ids)) is not None:
            return _InPlaceOf.apply(rows, dequantize(codes, rows.dtype))
        return rows if self.frozen else fake_quantize(rows, self.weight_format)

    @torch.no_grad()
    def freeze(self) -> Quantized:  # type: ignore[override]  # torch's is an annotation without a value
        """Quantize the weight permanently, for evaluation, and return it."""
        quantized = quantize(self.weight, self.weight_format)
        self.weight.copy_(dequantize(quantized, self.weight.dtype))
        self.hold(quantized)
        return quantized

    def hold(self, weight: Quantized) -> None:
        """Use these integers as the weight from now on; the Parameter has their values."""
        self.frozen = True

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, weight={self.weight_format}"


class _InPlaceOf(torch.autograd.Function):
    """The values of codes, with the gradient of the rows whose place they take."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, values: Tensor) -> Tensor:
        return values

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
