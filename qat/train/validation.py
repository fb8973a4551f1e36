"""Perplexity of the student during training, on sequences that it does not learn from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from qat.runtime import ranks
from qat.train.distill import LabelTargets

if TYPE_CHECKING:
    import deepspeed

Texts = Mapping[str, list[Tensor]]
"""Held-out sequences [1, tokens], by the name of their source."""


@torch.no_grad()
def perplexities(student: deepspeed.DeepSpeedEngine, texts: Texts, device: torch.device) -> dict[str, float]:
    """Measure the student's perplexity on each of the texts, shared out over all ranks."""
    student.eval()
    found = {name: _perplexity(student, sequences, device) for name, sequences in texts.items()}
    student.train()
    return found


def _perplexity(student: deepspeed.DeepSpeedEngine, sequences: list[Tensor], device: torch.device) -> float:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    ranks.announce("measuring perplexity")
    sums = torch.zeros(2, dtype=torch.float64, device=device)  # nats, tokens
    for first in range(0, len(sequences), world_size):
        # Under ZeRO-3 all ranks run together: one that has no sequence left repeats the last one, without counting it.
        ids = sequences[min(first + rank, len(sequences) - 1)].to(device)
        nll, _ = student(ids, LabelTargets(ids[0, 1:]))
        if first + rank < len(sequences):
            sums += torch.stack([nll * (ids.shape[1] - 1), nll.new_tensor(ids.shape[1] - 1)])
        ranks.progress()
    dist.all_reduce(sums)
    return math.exp(min((sums[0] / sums[1]).item(), 700.0))
