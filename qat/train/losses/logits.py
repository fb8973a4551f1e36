"""The paper's loss: cross-entropy with the teacher's complete distribution (LLM-QAT, section 2.3).

    loss = -(1/N) sum_tokens sum_v p_teacher(v) log p_student(v)

KL(teacher || student), which reaches 0, is the same minus the teacher's entropy. Gradient of the logits:
(p_student - p_teacher) / N.
"""

import torch
from torch import Tensor

from qat.quant.fused import fused
from qat.train.losses.base import Loss, log_softmax


class Logits(Loss):
    meaning = "cross-entropy with the teacher's distribution (the paper's choice)"
    takes_top_k = True

    def chunk(self, target: Tensor, tokens: int, student_logits: Tensor) -> tuple[Tensor, Tensor]:
        return _chunk(target, tokens, student_logits)

    def top_k(
        self, ids: Tensor, log_probabilities: Tensor, tokens: int, student_logits: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Count the remaining mass as one more token: the student learns how much is left, and keeps its own
        proportions there. Cross-entropy and KL are those of the k + 1 tokens: lower bounds of the full ones.

        With r the mass that the teacher leaves to the rest and s what the student leaves to it, the gradient is
        p_student - p_teacher on the k tokens, and p_student (1 - r / s) on all others.
        """
        log_student = log_softmax(student_logits)
        log_teacher = log_probabilities.to(log_student.dtype)
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


@fused
def _chunk(teacher_logits: Tensor, tokens: int, student_logits: Tensor) -> tuple[Tensor, Tensor]:
    log_student, log_teacher = log_softmax(student_logits), log_softmax(teacher_logits)
    teacher = log_teacher.exp()
    cross_entropy = -(teacher * log_student).sum()
    kl = (teacher * (log_teacher - log_student)).sum()
    student_logits.copy_((log_student.exp() - teacher) / tokens)
    return cross_entropy, kl
