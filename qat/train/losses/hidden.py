"""The paper's comparison: matches the hidden states of every layer, too."""

import torch
from torch import Tensor

from qat.train.losses.base import Records
from qat.train.losses.logits import Logits


class Hidden(Logits):
    meaning = "as logits, and the hidden states of every layer are matched"
    needs_hidden_states = True

    def extra(self, student: Records, teacher: Records) -> Tensor:
        """Compute the mean over the layers of |student - teacher|^2 / |teacher|^2: a few huge channels must not
        dominate it."""
        pairs = zip(student.hidden_states, teacher.hidden_states, strict=True)
        losses = [(s.float() - t.float()).square().sum() / t.float().square().sum() for s, t in pairs]
        return torch.stack(losses).mean()
