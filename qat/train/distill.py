"""What the student learns from, fused with its output layer.

    loss = -(1/N) sum_tokens sum_v p_teacher(v) log p_student(v)        (LLM-QAT, section 2.3)

The mean is over the N tokens; KL(teacher || student), which reaches 0, is the same less the teacher's
entropy. A [tokens, vocabulary] tensor exists only for a chunk of tokens at a time: the gradient of the
logits, (p_student - p_teacher) / N, is formed in the forward pass and contracted at once with the
output weight and the hidden states.

Other targets than the teacher's logits: the next token (``LabelTargets``), the teacher's most likely tokens
(``TopKTargets``). The paper's comparison adds a loss between hidden states, or between attention maps.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qat.quant.architecture import output_layer
from qat.quant.forward import predicting, run
from qat.quant.fused import fused
from qat.quant.kv_cache import AttentionRecord, attend
from qat.quant.products import matmul
from qat.runtime.errors import UserError

LOSSES = ("logits", "label", "logits+hidden", "logits+attention")

CHUNK_TOKENS = {"cpu": 128, "cuda": 1024}
"""Tokens whose logits exist at one time: few keep the memory small, a GPU needs many to keep its GEMMs large."""

VOCABULARY_BLOCK = 8192
"""Rows of the output weight whose gradient is added at one time."""

ChunkLoss = Callable[[int, Tensor], tuple[Tensor, Tensor]]
"""N, and a chunk of student logits [tokens, vocabulary] -> cross-entropy and KL, summed over the chunk's tokens. The
logits are overwritten by the gradient of cross-entropy / N: no other tensor of their size is needed."""


class Targets(ABC):
    """What the student shall predict of one sequence.

    Attributes:
        hidden_states: the teacher's, of every layer, where they are to be matched
        attention: the teacher's, where its attention maps are to be matched
    """

    hidden_states: tuple[Tensor, ...] | None = None
    attention: AttentionRecord | None = None

    @abstractmethod
    def chunks(self, tokens: int) -> Iterator[ChunkLoss]:
        """The loss of each chunk of up to ``tokens`` tokens, in order."""


class TeacherTargets(Targets):
    """What the teacher says of one sequence: its final hidden states, and its output layer when needed.

    Args:
        hidden: the teacher's final hidden states [tokens, hidden]
        head: opens the teacher's output weight [vocabulary, hidden] (under ZeRO-3: gathers it)
    """

    def __init__(
        self,
        hidden: Tensor,
        head: Callable[[], AbstractContextManager[Tensor]],
        hidden_states: tuple[Tensor, ...] | None = None,
        attention: AttentionRecord | None = None,
    ):
        self.hidden, self.head = hidden, head
        self.hidden_states, self.attention = hidden_states, attention

    @classmethod
    @torch.no_grad()
    def of(cls, teacher: PreTrainedModel, input_ids: Tensor) -> "TeacherTargets":
        """What ``teacher``, which is not sharded, predicts after each token but the last of input_ids [1, tokens]."""
        return cls(predicting(teacher, input_ids), lambda: nullcontext(teacher.lm_head.weight))

    def logits(self, tokens: int) -> Iterator[Tensor]:
        """The teacher's logits [up to ``tokens``, vocabulary], chunk by chunk."""
        with self.head() as weight:
            for hidden in self.hidden.split(tokens):
                yield matmul(hidden, weight.t())

    def chunks(self, tokens: int) -> Iterator[ChunkLoss]:
        for teacher_logits in self.logits(tokens):
            yield partial(_logit_loss, teacher_logits)


class LabelTargets(Targets):
    """The next token of each token [tokens]: no teacher is asked, and KL is the cross-entropy."""

    def __init__(self, labels: Tensor):
        self.labels = labels

    def chunks(self, tokens: int) -> Iterator[ChunkLoss]:
        for labels in self.labels.split(tokens):
            yield partial(_label_loss, labels)


class TopKTargets(Targets):
    """The teacher's k most likely tokens, [tokens, k], and their log-probabilities [tokens, k].

    The remaining mass counts as one more token: the student learns how much is left, and keeps its own proportions
    there. Cross-entropy and KL are those of the k + 1 tokens: lower bounds of the full ones.
    """

    def __init__(self, ids: Tensor, log_probabilities: Tensor):
        self.ids, self.log_probabilities = ids, log_probabilities

    def chunks(self, tokens: int) -> Iterator[ChunkLoss]:
        for ids, log_p in zip(self.ids.split(tokens), self.log_probabilities.split(tokens), strict=True):
            yield partial(_top_k_loss, ids, log_p)


class DistillationHead(nn.Linear):
    """The student's output layer: logits as ever, or, given targets, the loss.

    The loss is computed here because under ZeRO-3 the weight is whole only inside its module's forward.
    """

    @classmethod
    def convert(cls, linear: nn.Linear) -> "DistillationHead":
        """Turn ``linear`` into a DistillationHead in place; raises UserError if it adds a bias, which the loss has no
        place for."""
        if linear.bias is not None:
            raise UserError(
                "The model's lm_head has a bias, and the distillation loss is computed without one: give a model whose "
                "output layer is a matrix alone, as those of transformers' Llama, Mistral, Qwen2 and Qwen3 are."
            )
        linear.__class__ = cls
        assert isinstance(linear, cls)
        return linear

    def forward(self, hidden: Tensor, targets: Targets | None = None):
        """hidden [tokens, hidden] and targets -> (cross-entropy, KL), both scalars; without targets: logits."""
        if targets is None:
            return super().forward(hidden)
        # Without a gradient to come, no time or memory for it: autograd alone would not tell the function.
        weight = self.weight if torch.is_grad_enabled() else self.weight.detach()
        return _DistillationLoss.apply(hidden, weight, targets)


class Distiller(nn.Module):
    """The student as the engine sees it: token ids and targets in, the loss out.

    Args:
        student: a causal LM
        loss: one of LOSSES; it says what the targets must bring
    """

    def __init__(self, student: PreTrainedModel, loss: str = "logits"):
        super().__init__()
        self.student = student
        DistillationHead.convert(output_layer(student))
        if loss == "logits+attention":
            attend(student)

    def forward(self, input_ids: Tensor, targets: Targets) -> tuple[Tensor, Tensor]:
        """input_ids [1, tokens] -> (loss, KL), each the mean over the predicted tokens."""
        record = AttentionRecord() if targets.attention is not None else None
        hidden, hidden_states = run(self.student, input_ids, record, targets.hidden_states is not None)
        loss, kl = output_layer(self.student)(hidden, targets=targets)
        if targets.hidden_states is not None:
            loss = loss + hidden_state_loss(hidden_states, targets.hidden_states)
        if record is not None and targets.attention is not None:
            loss = loss + attention_loss(record, targets.attention)
        return loss, kl


def hidden_state_loss(student: tuple[Tensor, ...], teacher: tuple[Tensor, ...]) -> Tensor:
    """Mean over the layers of |student - teacher|^2 / |teacher|^2: a few huge channels must not decide it all."""
    losses = [
        (s.float() - t.float()).square().sum() / t.float().square().sum() for s, t in zip(student, teacher, strict=True)
    ]
    return torch.stack(losses).mean()


def attention_loss(student: AttentionRecord, teacher: AttentionRecord) -> Tensor:
    """KL(teacher || student) of the attention distributions: mean over layers, heads and query tokens."""
    losses = []
    for layer, recorded in teacher.layers.items():
        log_teacher, log_student = _log_attention(*recorded), _log_attention(*student.layers[layer])
        losses.append((log_teacher.exp() * (log_teacher - log_student)).sum(-1).mean())
    return torch.stack(losses).mean()


def _log_attention(query: Tensor, key: Tensor, scaling: float, window: int | None) -> Tensor:
    """Causal log-probabilities [batch, heads, tokens, tokens]; the lowest number where a token sees nothing."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    scores = (query.float() @ key.float().transpose(-1, -2)) * scaling
    everything = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device)
    hidden = everything.triu(1)
    if window is not None:
        hidden |= everything.tril(-window)
    return scores.masked_fill(hidden, torch.finfo(scores.dtype).min).log_softmax(-1)


class _DistillationLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Targets) -> tuple[Tensor, Tensor]:
        needs_grad = any(ctx.needs_input_grad)
        grad_hidden = torch.empty_like(hidden) if needs_grad else None
        grad_weight = torch.zeros_like(weight) if needs_grad else None
        cross_entropy = torch.zeros((), dtype=_at_least_fp32(hidden.dtype), device=hidden.device)
        kl = torch.zeros_like(cross_entropy)
        chunk = CHUNK_TOKENS[hidden.device.type]
        for number, loss in enumerate(targets.chunks(chunk)):
            rows = slice(number * chunk, (number + 1) * chunk)
            logits = matmul(hidden[rows], weight.t())
            chunk_ce, chunk_kl = loss(len(hidden), logits)
            cross_entropy += chunk_ce
            kl += chunk_kl
            if grad_hidden is not None and grad_weight is not None:
                grad_hidden[rows] = matmul(logits, weight)
                for some, grad in zip(
                    logits.split(VOCABULARY_BLOCK, 1), grad_weight.split(VOCABULARY_BLOCK), strict=True
                ):
                    grad += matmul(some.t(), hidden[rows])
            del logits  # before the next ones are made
        ctx.grads = grad_hidden, grad_weight  # not saved_tensors: backward must be able to let go of them
        cross_entropy /= len(hidden)
        kl /= len(hidden)
        ctx.mark_non_differentiable(kl)
        return cross_entropy, kl

    @staticmethod
    def backward(ctx, grad: Tensor, _):
        """Scales the gradients in place and gives them away: one as large as the output weight must not live on until
        the next loss has taken the place of this one, nor be copied where it is accumulated."""
        if ctx.grads is None:
            raise RuntimeError("backward through a distillation loss works once: compute the loss again.")
        grads, ctx.grads = ctx.grads, None
        return *(part.mul_(grad) for part in grads), None


# Each over a chunk of logits [tokens, vocabulary], in fp32 at least; see ChunkLoss.


@fused
def _logit_loss(teacher_logits: Tensor, tokens: int, student_logits: Tensor) -> tuple[Tensor, Tensor]:
    log_student, log_teacher = _log_softmax(student_logits), _log_softmax(teacher_logits)
    teacher = log_teacher.exp()
    cross_entropy = -(teacher * log_student).sum()
    kl = (teacher * (log_teacher - log_student)).sum()
    student_logits.copy_((log_student.exp() - teacher) / tokens)
    return cross_entropy, kl


@fused
def _label_loss(labels: Tensor, tokens: int, student_logits: Tensor) -> tuple[Tensor, Tensor]:
    log_student = _log_softmax(student_logits)
    cross_entropy = -log_student.gather(1, labels[:, None]).sum()
    columns = torch.arange(student_logits.shape[1], device=labels.device)
    student_logits.copy_((log_student.exp() - (columns == labels[:, None]).to(log_student.dtype)) / tokens)
    return cross_entropy, cross_entropy.clone()


def _log_softmax(logits: Tensor) -> Tensor:
    """By its definition: fused, only the sums need a pass of their own, and nothing large is stored."""
    logits = logits.to(_at_least_fp32(logits.dtype))
    return logits - torch.logsumexp(logits, -1, keepdim=True)


def _top_k_loss(ids: Tensor, log_teacher: Tensor, tokens: int, student_logits: Tensor) -> tuple[Tensor, Tensor]:
    """With r the mass that the teacher leaves to the rest and s what the student leaves to it, the gradient is
    p_student - p_teacher on the k tokens, and p_student (1 - r / s) on all others."""
    log_student = _log_softmax(student_logits)
    log_teacher = log_teacher.to(log_student.dtype)
    ids = ids.long()
    log_top = log_student.gather(1, ids)
    teacher = log_teacher.exp()
    tiny = torch.finfo(log_student.dtype).eps
    rest_teacher = (1 - teacher.sum(-1, keepdim=True)).clamp_(min=tiny)
    rest_student = (1 - log_top.exp().sum(-1, keepdim=True)).clamp_(min=tiny)
    cross_entropy = -(teacher * log_top).sum() - (rest_teacher * rest_student.log()).sum()
    entropy = -(teacher * log_teacher).sum() - (rest_teacher * rest_teacher.log()).sum()
    student = log_student.exp_()
    on_top = student.gather(1, ids) - teacher
    gradient = student.mul_(1 - rest_teacher / rest_student).scatter_(1, ids, on_top)
    student_logits.copy_(gradient.div_(tokens))
    return cross_entropy, cross_entropy - entropy


def _at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
