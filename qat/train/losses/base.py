"""The interface of a loss.

The student's logits [tokens, vocabulary] exist only for a chunk of tokens at a time. A loss gets them, and the targets
that they are compared with, and overwrites them by their gradient: qat/train/distill.py contracts it at once with the
output weight and the hidden states. A comparison of anything between the embedding and the output layer is an ``extra``
term, which autograd differentiates.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qat.quant.forward import run
from qat.quant.kv_cache import AttentionRecord

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ChunkLoss = Callable[[int, Tensor], tuple[Tensor, Tensor]]
"""``Loss.chunk`` or ``Loss.top_k`` without its first arguments: N, and the student's logits of a chunk."""


@dataclass(frozen=True)
class Records:
    """The records of a model's forward pass for ``Loss.extra``.

    Args:
        hidden_states: [1, tokens, hidden] in front of every layer and behind the last; empty unless the loss needs them
        attention: attention of every layer; None unless the loss needs it
    """

    hidden_states: tuple[Tensor, ...] = ()
    attention: AttentionRecord | None = None

    def split(self, lengths: tuple[int, ...]) -> list[Records]:
        """Return the records of each of the packed sequences of ``lengths`` tokens."""
        states = [layer.split(lengths, 1) for layer in self.hidden_states]
        attention = self.attention.split(lengths) if self.attention else [None] * len(lengths)
        return [Records(tuple(layer[i] for layer in states), attention[i]) for i in range(len(lengths))]


class Loss(ABC):
    """The loss that the student minimises, the mean over the predicted tokens of a sequence. A subclass defines:

    Attributes:
        meaning: half a sentence for ``--help``
        needs_teacher: whether a teacher runs; if not, the targets are the text's own next tokens
        needs_hidden_states: whether teacher and student record their hidden states
        needs_attention: whether they record their attention
        takes_top_k: whether ``top_k`` is there, for a cache of the teacher's most likely tokens
    """

    meaning: str
    needs_teacher: bool = True
    needs_hidden_states: bool = False
    needs_attention: bool = False
    takes_top_k: bool = False

    @abstractmethod
    def chunk(self, target: Tensor, tokens: int, student_logits: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the loss of a chunk, and overwrite ``student_logits`` by the gradient of loss / ``tokens``.

        Args:
            target: the teacher's logits [chunk, vocabulary]; without a teacher the next tokens [chunk]
            tokens: N, of the complete sequence
            student_logits: [chunk, vocabulary]; no other tensor of their size needs to live on

        Returns:
            the loss, and the figure that the log calls ``kl``: scalars, summed over the chunk, in fp32 at least
        """

    def top_k(
        self, ids: Tensor, log_probabilities: Tensor, tokens: int, student_logits: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Compute ``chunk`` when only the teacher's k most likely tokens [chunk, k] are known, with their
        log-probabilities [chunk, k]."""
        raise NotImplementedError

    def extra(self, student: Records, teacher: Records) -> Tensor | float:
        """Compute the term added to the loss, from the records of both models: a scalar with a graph to the student."""
        return 0.0

    @property
    def needs_records(self) -> bool:
        """Return whether there is an extra term: no teacher cache holds the records that it needs."""
        return self.needs_hidden_states or self.needs_attention

    def run(self, model: PreTrainedModel, input_ids: Tensor, lengths: tuple[int, ...] = ()) -> tuple[Tensor, Records]:
        """Run ``model`` over one sequence [1, tokens], or several of ``lengths`` tokens; return the final hidden states
        [tokens - 1 of each, hidden] that predict a token of it, and the records that the loss needs."""
        attention = AttentionRecord() if self.needs_attention else None
        hidden, hidden_states = run(model, input_ids, attention, self.needs_hidden_states, lengths)
        return hidden, Records(hidden_states, attention)


def log_softmax(logits: Tensor) -> Tensor:
    """Compute log-probabilities of logits, both [..., vocabulary], in fp32 at least, by their definition: when fused,
    only the sums need a pass of their own, and nothing large is stored."""
    logits = logits.to(at_least_fp32(logits.dtype))
    return logits - torch.logsumexp(logits, -1, keepdim=True)


def at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
