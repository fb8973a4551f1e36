"""The paper's comparison: matches the attention maps of every layer, too."""

import torch
from torch import Tensor

from qat.train.losses.base import Records
from qat.train.losses.logits import Logits


class Attention(Logits):
    meaning = "as logits, and the attention maps of every layer are matched"
    needs_attention = True

    def extra(self, student: Records, teacher: Records) -> Tensor:
        """Compute KL(teacher || student) of the attention distributions: mean over layers, heads and query tokens."""
        assert student.attention is not None
        assert teacher.attention is not None
        losses = []
        for layer, recorded in teacher.attention.layers.items():
            log_teacher, log_student = _log_attention(*recorded), _log_attention(*student.attention.layers[layer])
            losses.append((log_teacher.exp() * (log_teacher - log_student)).sum(-1).mean())
        return torch.stack(losses).mean()


def _log_attention(query: Tensor, key: Tensor, scaling: float, window: int | None) -> Tensor:
    """Compute causal log-probabilities [batch, heads, tokens, tokens]; the lowest number where a token sees nothing."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    scores = (query.float() @ key.float().transpose(-1, -2)) * scaling
    everything = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device)
    hidden = everything.triu(1)
    if window is not None:
        hidden |= everything.tril(-window)
    return scores.masked_fill(hidden, torch.finfo(scores.dtype).min).log_softmax(-1)
