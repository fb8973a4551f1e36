"""Distillation losses: one file for each, and the table of losses."""

from qat.runtime.table import Table
from qat.train.losses.attention import Attention
from qat.train.losses.base import ChunkLoss, Loss, Records
from qat.train.losses.hidden import Hidden
from qat.train.losses.label import Label
from qat.train.losses.logits import Logits

__all__ = ["LOSSES", "ChunkLoss", "Loss", "Records"]

LOSSES: Table[Loss] = Table(
    "loss",
    **{
        "logits": Logits(),
        "label": Label(),
        "logits+hidden": Hidden(),
        "logits+attention": Attention(),
    },
)
