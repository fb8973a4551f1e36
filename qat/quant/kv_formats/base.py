"""The interface of a KV cache format: what attention reads in place of keys and values, and the bytes that hold it.

A format says what is rotated before it is stored, and what that does to queries and to attention's output; how numbers
become bytes; and where the gradient passes. ``round`` is ``decode(encode(x))`` without the bytes in between: training
simulates exactly what is stored.
"""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from qat.quant.fused import fused
from qat.quant.number_format import Format
from qat.quant.quantizers.base import FloatFormat


class KVFormat(ABC):
    """A way to store keys or values. A new one is a file, and a line in ``qat.quant.kv_formats.KV_FORMATS``.

    Queries, keys and values, which methods call x, are [batch, heads, tokens, head_dim] here, after RoPE.

    Attributes:
        bits: bits of a code, which kv_bits must equal
        engine: the inference engine that stores keys and values so; empty if none does
        type: the engine's name for it; empty if there is no engine
        adjustable: whether the other settings of the KV cache determine it; any other format determines them
        pairs: whether the engine may store keys and values in different formats
        reorders: whether it stores the channels of keys as the engine's own copy of the model has them: see
            Architecture.interleaves
        served: how serving differs from training, in a few words; empty if no difference is known
        scales_tensors: whether it needs a scale of a layer's keys, and one of its values, measured before training
        float_format: the format of floats by which checkpoints for the engine describe it; None where they do not
        margin: factor by which keys and values may exceed those of the calibration text, in such scales
        tensor_scale: this scale; until it is known, what is read is NaN
    """

    bits: int
    engine: ClassVar[str] = ""
    type: str
    adjustable: ClassVar[bool] = False
    pairs: ClassVar[bool] = False
    reorders: ClassVar[bool] = False
    served: ClassVar[str] = ""
    scales_tensors: ClassVar[bool] = False
    float_format: ClassVar[FloatFormat | None] = None
    margin: float = 1.0
    tensor_scale: float | None = None

    @property
    @abstractmethod
    def meaning(self) -> str:
        """Return, in a few words for ``--help``, what the format is."""

    def of(self, form: Format, granularity: str, rotation: str) -> "KVFormat":
        """Return the format that has these settings: itself, if it has none."""
        return self

    def scale_of_tensor(self, largest: float) -> float:
        """Compute the scale of keys, or of values, as they are stored, whose largest magnitude is given."""
        raise NotImplementedError

    def for_tensor(self, scale: float) -> "KVFormat":
        """Return this format with the given scale."""
        raise NotImplementedError

    def flags(self, values: "KVFormat") -> str:
        """Return the flags that make the engine store keys so, and values as ``values``."""
        return ""

    def check(self, head_dim: int) -> None:  # noqa: B027
        """Raise UserError if the format cannot store heads of this size."""

    def queries(self, x: Tensor) -> Tensor:
        """Return the queries that are multiplied with keys stored in this format."""
        return x

    def keys(self, x: Tensor) -> Tensor:
        """Rotate keys as they are stored. The result may be in fp32, where the engine does not round it."""
        return x

    def values(self, x: Tensor) -> Tensor:
        """Rotate values as they are stored; see ``keys``."""
        return x

    def outputs(self, x: Tensor) -> Tensor:
        """Undo ``values`` on attention's output, which is [batch, tokens, heads, head_dim]."""
        return x

    @abstractmethod
    def round(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Return rotated keys or values as they are read back, of ``dtype``, with the straight-through gradient: 0
        where a value was clipped."""

    @abstractmethod
    def encode(self, x: Tensor) -> Tensor:
        """Return the bytes, uint8 [batch, groups, tokens, bytes], of rotated keys or values."""

    @abstractmethod
    def decode(self, packed: Tensor, kv_heads: int, dtype: torch.dtype) -> Tensor:
        """Return keys or values [batch, kv_heads, tokens, head_dim] as they are read back from bytes [batch, groups,
        tokens, bytes], of ``dtype`` and still rotated."""

    def stored_bits(self, head_dim: int) -> float:
        """Return the bits that one number takes, its part of the scales included."""
        return 8 * self.encode(torch.zeros(1, 1, 1, head_dim)).shape[-1] / head_dim


class BlockFormat(KVFormat):
    """A format of blocks of consecutive channels of one token and head, each with a grid of its own. All of it is done
    on rows: one block each. A subclass says how codes are made, read and packed.

    Attributes:
        block: channels of a block; 0 if a head is one
        block_bytes: bytes of a block; 0 if a head is one
        low, high: the first and the last code
        clips: whether a value can lie beyond them: its gradient is 0
    """

    block: ClassVar[int] = 0
    low: float
    high: float
    clips: ClassVar[bool] = False

    @property
    def block_bytes(self) -> int:
        return 0

    @abstractmethod
    def codes(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Return the codes of rows [blocks, n] in fp32, not yet limited to ``low`` and ``high``, and the parts of their
        grid [blocks, 1], in fp32, as they are read."""

    @abstractmethod
    def numbers(self, codes: Tensor, *grid: Tensor) -> Tensor:
        """Return the numbers [blocks, n], in fp32, of codes on a grid."""

    @abstractmethod
    def pack(self, codes: Tensor, *grid: Tensor) -> Tensor:
        """Return the bytes [blocks, bytes] of codes and grid."""

    @abstractmethod
    def unpack(self, packed: Tensor) -> tuple[Tensor, ...]:
        """Undo ``pack``: return the codes [blocks, n] and the parts of their grid [blocks, 1]."""

    def round(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return _StraightThrough.apply(x, self, dtype)

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        codes, *grid = _fused_codes(self._rows(x), self)
        return self.pack(codes, *grid).view(*x.shape[:-1], -1)

    @torch.no_grad()
    def decode(self, packed: Tensor, kv_heads: int, dtype: torch.dtype) -> Tensor:
        rows = packed.reshape(-1, self.block_bytes or packed.shape[-1])
        codes, *grid = self.unpack(rows)
        return _fused_numbers(codes, grid, self, dtype).view(*packed.shape[:-1], -1)

    def _rows(self, x: Tensor) -> Tensor:
        return x.detach().reshape(-1, self.block or x.shape[-1])


@fused
def _fused_codes(rows: Tensor, form: BlockFormat) -> tuple[Tensor, ...]:
    codes, *grid = form.codes(rows.float())
    return codes.clamp(form.low, form.high), *grid


@fused
def _fused_numbers(codes: Tensor, grid: list[Tensor], form: BlockFormat, dtype: torch.dtype) -> Tensor:
    return form.numbers(codes, *grid).to(dtype)


@fused
def _fused_round(rows: Tensor, form: BlockFormat, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    codes, *grid = form.codes(rows.float())
    limited = codes.clamp(form.low, form.high)
    inside = limited == codes if form.clips else None
    return form.numbers(limited, *grid).to(dtype), inside


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, form: BlockFormat, dtype: torch.dtype) -> Tensor:
        ctx.clips, ctx.dtype = form.clips, x.dtype
        numbers, inside = _fused_round(form._rows(x), form, dtype)
        if inside is not None:
            ctx.save_for_backward(inside.view(x.shape))
        return numbers.view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        grad = grad.to(ctx.dtype)
        return grad * ctx.saved_tensors[0] if ctx.clips else grad, None, None
