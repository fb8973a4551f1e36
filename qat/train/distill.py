"""The student's targets, and the loss, fused with its output layer.

A [tokens, vocabulary] tensor exists only for a chunk of tokens at a time: the loss (qat/train/losses) overwrites a
chunk's logits by their gradient, in the forward pass, and it is contracted at once with the output weight and the
hidden states.

``Targets`` define what is to be predicted of a sequence, and by which loss: the teacher's logits (``TeacherTargets``),
the teacher's most likely tokens (``TopKTargets``), or the next token (``LabelTargets``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qat.quant.architecture import output_layer
from qat.quant.linear import QuantLinear
from qat.quant.number_format import Quantized, dequantize, inside, passed, quantize
from qat.quant.packing import stand_in
from qat.quant.products import block_dtype, matmul, matmul_blocks, matmul_codes
from qat.quant.quantizers.base import Grid
from qat.runtime.errors import UserError
from qat.train.losses import LOSSES, ChunkLoss, Loss, Records
from qat.train.losses.base import at_least_fp32

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHUNK_TOKENS = {"cpu": 256, "cuda": 1024}
"""Number of tokens whose logits exist at one time: few keep the memory small, a GPU needs many to keep its GEMMs
large."""

VOCABULARY_BLOCK = 8192
"""Number of rows of the output weight whose gradient is added at one time, and whose rounded values exist at one
time."""


class Targets(ABC):
    """The predictions that the student should make on one sequence, or on several that are packed into one row.

    Attributes:
        lengths: the number of predicted tokens of each sequence
        loss: the loss to compute
        records: what the loss needs recorded of the teacher
    """

    lengths: tuple[int, ...]
    loss: Loss = LOSSES["logits"]
    records: Records = Records()

    @abstractmethod
    def chunks(self, tokens: int) -> Iterator[ChunkLoss]:
        """Yield the loss of each chunk of up to ``tokens`` tokens, in order; see ``split``."""

    def split(self, tokens: int) -> list[tuple[int, int]]:
        """Return the chunks: the number of the sequence that each belongs to, and its number of tokens."""
        return [
            (sequence, min(tokens, length - first))
            for sequence, length in enumerate(self.lengths)
            for first in range(0, length, tokens)
        ]

    def _split(self, of_tokens: Tensor, tokens: int) -> tuple[Tensor, ...]:
        """Split a tensor [all predicted tokens, ...] into the chunks."""
        return of_tokens.split([rows for _, rows in self.split(tokens)])


class TeacherTargets(Targets):
    """The teacher's predictions on one sequence: its final hidden states, and its output layer when needed.

    Args:
        hidden: the teacher's final hidden states [tokens, hidden]
        head: the teacher's output weight [vocabulary, hidden]
        loss: one that needs a teacher
        records: what ``loss.run`` recorded of the teacher
        lengths: the number of predicted tokens of each sequence; by default there is one
    """

    def __init__(
        self,
        hidden: Tensor,
        head: Tensor,
        loss: Loss = LOSSES["logits"],
        records: Records = Targets.records,
        lengths: tuple[int, ...] = (),
    ):
        self.hidden, self.head = hidden, head
        self.loss, self.records = loss, records
        self.lengths = lengths or (len(hidden),)

    @classmethod
    @torch.no_grad()
    def of(cls, teacher: PreTrainedModel, input_ids: Tensor, loss: Loss = LOSSES["logits"]) -> TeacherTargets:
        """Compute the predictions of ``teacher``, which is not sharded, after each token but the last of input_ids [1,
        tokens]."""
        hidden, records = loss.run(teacher, input_ids)
        return cls(hidden, output_layer(teacher).weight, loss, records)

    def logits(self, tokens: int) -> Iterator[Tensor]:
        """Yield the teacher's logits [up to ``tokens``, vocabulary], chunk by chunk."""
        for hidden in self._split(self.hidden, tokens):
            yield matmul(hidden, self.head.t())

    def chunks(self, tokens: int) -> Iterator[ChunkLoss]:
        for teacher_logits in self.logits(tokens):
            yield partial(self.loss.chunk, teacher_logits)


class LabelTargets(Targets):
    """The next token of each token [tokens], for a loss that needs no teacher."""

    def __init__(self, labels: Tensor, loss: Loss = LOSSES["label"], lengths: tuple[int, ...] = ()):
        self.labels, self.loss = labels, loss
        self.lengths = lengths or (len(labels),)

    def chunks(self, tokens: int) -> Iterator[ChunkLoss]:
        for labels in self._split(self.labels, tokens):
            yield partial(self.loss.chunk, labels)


class TopKTargets(Targets):
    """The teacher's k most likely tokens [tokens, k], and their log-probabilities [tokens, k], for a loss that takes
    them."""

    def __init__(
        self,
        ids: Tensor,
        log_probabilities: Tensor,
        loss: Loss = LOSSES["logits"],
        lengths: tuple[int, ...] = (),
    ):
        self.ids, self.log_probabilities, self.loss = ids, log_probabilities, loss
        self.lengths = lengths or (len(ids),)

    def chunks(self, tokens: int) -> Iterator[ChunkLoss]:
        both = self._split(self.ids, tokens), self._split(self.log_probabilities, tokens)
        for ids, log_p in zip(*both, strict=True):
            yield partial(self.loss.top_k, ids, log_p)


class DistillationHead(nn.Linear):
    """The student's output layer: it computes logits as usual, or, given targets, the loss.

    The loss is computed here because under ZeRO-3 the complete weight exists only inside its module's forward.
    """

    @classmethod
    def convert(cls, linear: nn.Linear) -> DistillationHead:
        """Turn ``linear``, quantized or not, into a DistillationHead in place; raise UserError if it has a bias, which
        the loss does not support."""
        if linear.bias is not None:
            raise UserError(
                "The model's output layer has a bias, and the distillation loss is computed without one: give a model "
                "whose output layer is a matrix alone, as those of transformers' Llama, Mistral, Qwen2 and Qwen3 are."
            )
        linear.__class__ = _QuantDistillationHead if isinstance(linear, QuantLinear) else cls
        assert isinstance(linear, cls)
        return linear

    def forward(self, hidden: Tensor, targets: Targets | None = None) -> Any:
        """Compute (loss, KL), both scalars, of hidden [tokens, hidden] and targets; without targets, compute logits."""
        if targets is None:
            return super().forward(hidden)
        # Without a gradient to come, spend no time or memory on it: autograd alone would not tell the function.
        weight = self.weight if torch.is_grad_enabled() else self.weight.detach()
        return _DistillationLoss.apply(hidden, weight, targets, self)


class _QuantDistillationHead(DistillationHead, QuantLinear):  # type: ignore[misc]  # both have a ``convert``
    """The output layer where its weight, or its input, is quantized."""


class Distiller(nn.Module):
    """The student as the engine uses it: token ids and targets in, the loss out.

    Args:
        student: a causal LM
    """

    def __init__(self, student: PreTrainedModel):
        super().__init__()
        if student.dtype == torch.float16:
            raise UserError("The student is in fp16, whose range is too small for gradients: load it in fp32 or bf16.")
        self.student = student
        DistillationHead.convert(output_layer(student))

    def gradient_checkpointing_enable(self, *args: Any, **how: Any) -> None:
        """Enable gradient checkpointing of the student, as the Trainer of Hugging Face does with a model."""
        self.student.gradient_checkpointing_enable(*args, **how)

    def forward(self, input_ids: Tensor, targets: Targets) -> tuple[Tensor, Tensor]:
        """Compute (loss, KL), each the mean over the predicted tokens, of input_ids [1, tokens]; of several packed
        sequences, the mean over the sequences. Raises UserError under autocast."""
        if torch.is_autocast_enabled(input_ids.device.type):
            raise UserError(
                "Autocast would change the dtypes of what is quantized: leave out bf16, fp16 and mixed_precision, and "
                "load the student in the dtype in which it is to compute."
            )
        lengths = tuple(length + 1 for length in targets.lengths)
        hidden, records = targets.loss.run(self.student, input_ids, lengths)
        loss, kl = output_layer(self.student)(hidden, targets=targets)
        pairs = zip(records.split(lengths), targets.records.split(lengths), strict=True)
        extra = sum(targets.loss.extra(student, teacher) for student, teacher in pairs)
        return loss + extra / len(lengths), kl


class _DistillationLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Targets, head: DistillationHead
    ) -> tuple[Tensor, Tensor]:
        needs_hidden, needs_weight, *_ = ctx.needs_input_grad
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight: Tensor | None = None
        lengths, chunk, first = targets.lengths, CHUNK_TOKENS[hidden.device.type], 0
        sums = torch.zeros(2, len(lengths), dtype=at_least_fp32(hidden.dtype), device=hidden.device)  # loss, KL
        product = _QuantProduct(hidden, weight, head) if isinstance(head, QuantLinear) else _Product(hidden, weight)
        for (sequence, tokens), chunk_loss in zip(targets.split(chunk), targets.chunks(chunk), strict=True):
            rows = slice(first, first := first + tokens)
            logits = product.logits(rows)
            # Divided by the tokens of its sequence, and by the sequences: the gradient of the mean of their means.
            loss, chunk_kl = chunk_loss(lengths[sequence] * len(lengths), logits)
            sums[0, sequence] += loss
            sums[1, sequence] += chunk_kl
            if grad_hidden is not None:
                grad_hidden[rows] = product.grad_hidden(logits)
            if needs_weight:
                grad_weight = _plus_product(grad_weight, logits, product.hidden[rows])
            del logits  # before the next ones are made
        product.mask(grad_hidden, grad_weight)
        ctx.grads = grad_hidden, grad_weight  # not saved_tensors: backward must be able to release them
        means = [sums[:, sequence] / length for sequence, length in enumerate(lengths)]
        total, kl = torch.stack(means).mean(0).unbind()
        ctx.mark_non_differentiable(kl)
        return total, kl

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the gradients in place and give them away: one as large as the output weight must not stay alive until
        the next loss has replaced this one, nor be copied where it is accumulated."""
        if ctx.grads is None:
            raise RuntimeError("backward through a distillation loss works once: compute the loss again.")
        grads, ctx.grads = ctx.grads, None
        return *(None if part is None else part.mul_(grad) for part in grads), None, None


def _plus_product(total: Tensor | None, grad: Tensor, hidden: Tensor) -> Tensor:
    """Add the output weight's gradient of some tokens, of their logits [tokens, vocabulary] and their hidden states
    [tokens, hidden], to the total [vocabulary, hidden] of those before, in place. The first of them are the total: it
    need not be filled with zeros and added to."""
    if total is None:
        return matmul(grad.t(), hidden)
    for part, some in zip(total.split(VOCABULARY_BLOCK), grad.split(VOCABULARY_BLOCK, 1), strict=True):
        part += matmul(some.t(), hidden)
    return total


class _Product:
    """The product of final hidden states [tokens, hidden] and the output weight [vocabulary, hidden]."""

    def __init__(self, hidden: Tensor, weight: Tensor):
        self.hidden, self.weight = hidden, weight

    def logits(self, rows: slice) -> Tensor:
        """Compute the logits [rows, vocabulary] of some of the tokens."""
        return matmul(self.hidden[rows], self.weight.t())

    def grad_hidden(self, grad: Tensor) -> Tensor:
        """Compute the gradient of hidden states [rows, hidden] from that of their logits [rows, vocabulary]."""
        return matmul(grad, self.weight)

    def mask(self, grad_hidden: Tensor | None, grad_weight: Tensor | None) -> None:
        """Set gradients [tokens, hidden], [vocabulary, hidden] of what was clipped to 0; here nothing is."""


class _QuantProduct(_Product):
    """The product of a quantized output layer, with the values of QuantLinear's.

    Beside the Parameter there are a byte for each of its elements, its codes, made once; and the values of one block of
    rows at a time. The gradients are straight-through.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, head: QuantLinear):
        super().__init__(hidden, weight)
        self.head, self.unrounded = head, hidden
        self.input = quantize(hidden, head.input_format) if head.input_format.quantizes else None
        if self.input is not None:
            self.hidden = dequantize(self.input, hidden.dtype)
        blocks = weight.split(VOCABULARY_BLOCK) if head.weight_format.quantizes and not head.frozen else ()
        codes = stand_in(head.weight, head.weight_format)
        if codes is None and head.codes is not None:  # a frozen layer multiplies codes too
            codes = head.integers()
        if codes is not None:
            parts = (part.split(VOCABULARY_BLOCK) for part in (codes.codes, *codes.grid) if part is not None)
            self.blocks = [Quantized(own, Grid(*grid)) for own, *grid in zip(*parts, strict=True)]
        else:
            self.blocks = [quantize(block, head.weight_format) for block in blocks]

    def logits(self, rows: slice) -> Tensor:
        if not self.blocks:
            return super().logits(rows)
        hidden = self.hidden[rows]
        logits = hidden.new_empty(len(hidden), len(self.weight))
        if self.input is not None and self.head.multiplies_blocks:
            hidden = dequantize(
                Quantized(self.input.codes[rows], self.input.grid.map(lambda part: part[rows])),
                block_dtype(hidden.dtype),
            )
        for block, part in zip(self.blocks, logits.split(VOCABULARY_BLOCK, 1), strict=True):
            if self.input is not None and self.head.multiplies_codes:
                codes = Quantized(self.input.codes[rows], self.input.grid.map(lambda part: part[rows]))
                part.copy_(matmul_codes(codes, block, self.head.weight_format.code_range[1], hidden.dtype))
            elif self.input is not None and self.head.multiplies_blocks:
                part.copy_(matmul_blocks(hidden, block, part.dtype))
            else:
                part.copy_(matmul(hidden, dequantize(block, self.weight.dtype).t()))
        return logits

    def grad_hidden(self, grad: Tensor) -> Tensor:
        if not self.blocks:
            return super().grad_hidden(grad)
        total = grad.new_zeros(len(grad), self.hidden.shape[1], dtype=at_least_fp32(grad.dtype))
        for block, part in zip(self.blocks, grad.split(VOCABULARY_BLOCK, 1), strict=True):
            total += matmul(part, dequantize(block, self.weight.dtype))
        return total

    def mask(self, grad_hidden: Tensor | None, grad_weight: Tensor | None) -> None:
        if grad_hidden is not None and self.input is not None and self.head.input_format.clips:
            grad_hidden *= inside(self.unrounded, self.head.input_format, self.input.grid)
        if grad_weight is not None and self.blocks and self.head.weight_format.clips and not self.head.frozen:
            parts = (part.split(VOCABULARY_BLOCK) for part in (self.weight, grad_weight))
            for block, weight, grad in zip(self.blocks, *parts, strict=True):
                grad.copy_(passed(grad, weight, self.head.weight_format, block.grid))
