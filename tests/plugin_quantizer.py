"""A quantizer and a loss as somebody else would add them: ``--plugin plugin_quantizer``.

The quantizer has a zero point, clips, and learns both its step and its zero point, with the gradients that autograd
finds for the straight-through estimate.
"""

import torch

from qat.quant.quantizers import QUANTIZERS
from qat.quant.quantizers.base import LearnedQuantizer
from qat.train.losses import LOSSES
from qat.train.losses.base import Loss, log_softmax


class LearnedRange(LearnedQuantizer):
    meaning = "a learned step and a learned zero point per layer"
    symmetric = False
    size = 2

    def initial(self, x, qmax):
        low, high = x.float().min(), x.float().max()
        step = (high - low) / (2 * qmax + 1) * 0.9  # clips from the start
        return torch.stack([step, -low / step - (qmax + 1)])

    def fake_quantize(self, x, parameter, qmax):
        step, zero_point = parameter
        scaled = (x / step + zero_point).clamp(-qmax - 1, qmax)
        codes = scaled + (scaled.round() - scaled).detach()
        return (codes - zero_point) * step


class Squared(Loss):
    meaning = "squared distance of the probabilities"

    def chunk(self, target, tokens, student_logits):
        log_student, log_teacher = log_softmax(student_logits), log_softmax(target)
        student, teacher = log_student.exp(), log_teacher.exp()
        slope = 2 * (student - teacher)
        student_logits.copy_(student * (slope - (slope * student).sum(-1, keepdim=True)) / tokens)
        return (student - teacher).square().sum(), (teacher * (log_teacher - log_student)).sum()


QUANTIZERS.add("learned_range", LearnedRange())
LOSSES.add("squared", Squared())
