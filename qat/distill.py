"""Logit distillation, fused with the student's output layer.

    loss = -(1/N) sum_tokens sum_v p_teacher(v) log p_student(v)        (LLM-QAT, section 2.3)

The mean is over the N tokens; KL(teacher || student), which reaches 0, is the same less the teacher's
entropy. A [tokens, vocabulary] tensor exists only for a chunk of tokens at a time: the gradient of the
logits, (p_student - p_teacher) / N, is formed in the forward pass and contracted at once with the
output weight and the hidden states.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

CHUNK_TOKENS = {"cpu": 128, "cuda": 1024}
"""Tokens whose logits exist at one time: few keep the memory small, a GPU needs many to keep its GEMMs large."""


class TeacherTargets:
    """What the teacher says of one sequence: its final hidden states, and its output layer when needed.

    Args:
        hidden: the teacher's final hidden states [tokens, hidden]
        head: opens the teacher's output weight [vocabulary, hidden] (under ZeRO-3: gathers it)
    """

    def __init__(self, hidden: Tensor, head: Callable[[], AbstractContextManager[Tensor]]):
        self.hidden, self.head = hidden, head

    def logits(self, chunk_tokens: int) -> Iterator[Tensor]:
        """The teacher's logits [up to chunk_tokens, vocabulary], chunk by chunk."""
        with self.head() as weight:
            for hidden in self.hidden.split(chunk_tokens):
                yield hidden @ weight.t()


class DistillationHead(nn.Linear):
    """The student's ``lm_head``: logits as ever, or, given the teacher's targets, the loss.

    The loss is computed here because under ZeRO-3 the weight is whole only inside its module's forward.
    """

    @classmethod
    def convert(cls, linear: nn.Linear) -> "DistillationHead":
        """Turn ``linear`` into a DistillationHead in place."""
        linear.__class__ = cls
        assert isinstance(linear, cls)
        return linear

    def forward(self, hidden: Tensor, targets: TeacherTargets | None = None):
        """hidden [tokens, hidden] and targets -> (cross-entropy, KL), both scalars; without targets: logits."""
        if targets is None:
            return super().forward(hidden)
        return _DistillationLoss.apply(hidden, self.weight, targets)


class Distiller(nn.Module):
    """The student as the engine sees it: token ids and the teacher's targets in, the loss out."""

    def __init__(self, student: nn.Module):
        super().__init__()
        self.student = student
        DistillationHead.convert(student.lm_head)  # type: ignore[arg-type]

    def forward(self, input_ids: Tensor, targets: TeacherTargets) -> tuple[Tensor, Tensor]:
        """input_ids [1, tokens] -> (cross-entropy, KL), each the mean over the predicted tokens."""
        return self.student.lm_head(predicting(self.student, input_ids), targets=targets)  # type: ignore[operator]


def predicting(model: nn.Module, input_ids: Tensor) -> Tensor:
    """Final hidden states [tokens - 1, hidden] of one sequence [1, tokens]: those that predict a token of it."""
    return model.model(input_ids=input_ids, use_cache=False).last_hidden_state[0, :-1]  # type: ignore[operator]


class _DistillationLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: TeacherTargets) -> tuple[Tensor, Tensor]:
        needs_grad = any(ctx.needs_input_grad)
        grad_hidden = torch.empty_like(hidden) if needs_grad else None
        grad_weight = torch.zeros_like(weight) if needs_grad else None
        cross_entropy = torch.zeros((), dtype=_at_least_fp32(hidden.dtype), device=hidden.device)
        kl = torch.zeros_like(cross_entropy)
        start = 0
        for teacher_logits in targets.logits(CHUNK_TOKENS[hidden.device.type]):
            rows = slice(start, start + len(teacher_logits))
            start = rows.stop
            chunk_ce, chunk_kl, grad_logits = _chunk_loss(hidden[rows] @ weight.t(), teacher_logits)
            cross_entropy += chunk_ce
            kl += chunk_kl
            if grad_hidden is not None and grad_weight is not None:
                grad_logits = grad_logits.div_(len(hidden)).to(hidden.dtype)
                torch.mm(grad_logits, weight, out=grad_hidden[rows])
                grad_weight.addmm_(grad_logits.t(), hidden[rows])
        ctx.grads = grad_hidden, grad_weight
        cross_entropy /= len(hidden)
        kl /= len(hidden)
        ctx.mark_non_differentiable(kl)
        return cross_entropy, kl

    @staticmethod
    def backward(ctx, grad: Tensor, _):
        grad_hidden, grad_weight = ctx.grads
        return grad_hidden * grad, grad_weight * grad, None


def _chunk_loss(student_logits: Tensor, teacher_logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over a chunk [tokens, vocabulary]: cross-entropy, KL; and p_student - p_teacher. In fp32 at least."""
    log_student = torch.log_softmax(student_logits, -1, dtype=_at_least_fp32(student_logits.dtype))
    log_teacher = torch.log_softmax(teacher_logits, -1, dtype=log_student.dtype)
    teacher = log_teacher.exp()
    cross_entropy = -(teacher * log_student).sum()
    kl = (teacher * log_teacher.sub_(log_student)).sum()
    return cross_entropy, kl, log_student.exp_().sub_(teacher)


def _at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
