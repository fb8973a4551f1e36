"""Cross-entropy with the text's own next token: no teacher is needed, and KL is the cross-entropy."""

import torch
from torch import Tensor

from qat.quant.fused import fused
from qat.train.losses.base import Loss, log_softmax


class Label(Loss):
    meaning = "cross-entropy with the next token, without a teacher"
    needs_teacher = False

    def chunk(self, target: Tensor, tokens: int, student_logits: Tensor) -> tuple[Tensor, Tensor]:
        return _chunk(target, tokens, student_logits)


@fused
def _chunk(labels: Tensor, tokens: int, student_logits: Tensor) -> tuple[Tensor, Tensor]:
    log_student = log_softmax(student_logits)
    cross_entropy = -log_student.gather(1, labels[:, None]).sum()
    columns = torch.arange(student_logits.shape[1], device=labels.device)
    student_logits.copy_((log_student.exp() - (columns == labels[:, None]).to(log_student.dtype)) / tokens)
    return cross_entropy, cross_entropy.clone()
