"""The settings of a training run."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qat.quant.config import QuantConfig
from qat.quant.learned_scales import TRAINED, Trained
from qat.quant.linear import ARITHMETIC, can_multiply_codes
from qat.runtime.errors import UserError, check_least
from qat.runtime.table import check_choices, choice
from qat.train import plateau
from qat.train.losses import LOSSES


@dataclass(frozen=True)
class TrainConfig:
    """The student's training: AdamW without weight decay, one sequence at a time. The defaults are the paper's.

    Args:
        loss: what the student minimises
        train: which Parameters of the student learn
        steps: optimizer steps; 0 for one pass over the data
        lr: peak learning rate
        warmup_steps: steps of linear warm-up before the cosine
        min_lr_ratio: the cosine ends at this fraction of lr
        decay_steps: length of the final cosine decay, with constant lr before it; 0: decay over all steps after warm-up
        stop_when_flat: every this many steps at constant lr, test whether the KL still falls; if not, run decay_steps
            and stop; 0: never
        batch_size: sequences per optimizer step, over all ranks (the paper: one on each of 8 GPUs)
        micro_batch_size: sequences that a rank packs into one row of a forward pass, without padding; each attends to
            itself alone, and the result is the same as one at a time; must divide a rank's share
        gradient_clipping: largest global gradient norm; 0: no clipping
        gradient_checkpointing: recompute activations in backward: less memory, a third more time
        save_every: steps between checkpoints
        keep: how many checkpoints to keep
        eval_every: steps between measurements of the perplexity on held-out sequences, if any are given
        max_loss_ratio: stop if a step's loss is more than this many times its average; 0: never
        peak_flops: peak FLOP/s of a device (989e12 for bf16 on an H100); enables logging of the model FLOP utilisation
        deterministic: on GPUs, a resumed run continues bit for bit; slower (docs/gpu/). CPUs always do so
        seed: seed for the data order
    """

    loss: str = choice("logits", lambda: LOSSES)
    train: str = choice("weights", lambda: TRAINED)
    steps: int = 0
    lr: float = 2e-5
    warmup_steps: int = 0
    min_lr_ratio: float = 0.0
    decay_steps: int = 0
    stop_when_flat: int = 0
    batch_size: int = 8
    micro_batch_size: int = 1
    gradient_clipping: float = 1.0
    gradient_checkpointing: bool = True
    save_every: int = 500
    keep: int = 2
    eval_every: int = 500
    max_loss_ratio: float = 4.0
    peak_flops: float = 0.0
    deterministic: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_choices(self)
        check_least(self, steps=0, warmup_steps=0, min_lr_ratio=0, gradient_clipping=0, max_loss_ratio=0, peak_flops=0)
        check_least(self, batch_size=1, micro_batch_size=1, save_every=1, keep=1, eval_every=1, decay_steps=0)
        if self.stop_when_flat and self.stop_when_flat < plateau.FEWEST:
            raise UserError(
                f"stop_when_flat={self.stop_when_flat} is invalid: choose 0, or {plateau.FEWEST} or more steps, say "
                "100."
            )
        if self.stop_when_flat and not self.decay_steps:
            raise UserError(
                "stop_when_flat judges steps at constant lr, and with decay_steps=0 there are none: give decay_steps "
                "too, say a fifth of the steps."
            )
        if not 0 < self.lr < 1:
            raise UserError(f"lr={self.lr} is invalid: choose a learning rate above 0 and below 1, say 2e-5.")

    @property
    def trained(self) -> Trained:
        """Return which Parameters of the student learn."""
        return TRAINED[self.train]

    def lr_factor(self, step: int) -> float:
        """Return the learning rate of optimizer step ``step`` (from 0) over ``lr``: linear warm-up, then a cosine, with
        constant steps between the two where there are decay_steps."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        begin = max(self.warmup_steps, self.steps - self.decay_steps if self.decay_steps else 0)
        progress = max(0, step - begin) / max(1, self.steps - begin)
        return self.min_lr_ratio + (1 - self.min_lr_ratio) * (1 + math.cos(math.pi * min(progress, 1.0))) / 2

    def ds_settings(self, world_size: int) -> dict[str, object]:
        """Return the settings that a DeepSpeed JSON must not contradict, by its dotted keys.

        Raises UserError for a batch that ``world_size`` ranks cannot share.
        """
        if self.batch_size % world_size:
            raise UserError(
                f"batch_size={self.batch_size} cannot be shared by {world_size} ranks: give a multiple of "
                f"{world_size}, or start a number of ranks that divides {self.batch_size}."
            )
        share = self.batch_size // world_size
        if share % self.micro_batch_size:
            raise UserError(
                f"micro_batch_size={self.micro_batch_size} does not divide a rank's share of {share} sequences per "
                f"step: give a divisor of {share}, or another --batch_size."
            )
        return {
            "train_batch_size": self.batch_size,
            "train_micro_batch_size_per_gpu": self.micro_batch_size,
            "gradient_accumulation_steps": share // self.micro_batch_size,
            "gradient_clipping": self.gradient_clipping,
            "optimizer.type": "AdamW",
            "optimizer.params.lr": self.lr,
            "optimizer.params.weight_decay": 0.0,
        }


def arithmetic_of(settings: dict[str, Any], run: Path) -> str:
    """Return the arithmetic of the run in folder ``run``, begun with ``settings``.

    The first version recorded in the folder, not in the settings, whether it multiplied codes or floats; in bf16 it
    also rounded the frequencies of RoPE.
    """
    if "arithmetic" in settings:
        return settings["arithmetic"]
    if (settings.get("bf16") or {}).get("enabled"):
        return "RoPE in bf16"
    record = run / "integer_product"
    quant = QuantConfig(**QuantConfig.among(settings))
    in_floats = record.is_file() and record.read_text() == "floats"
    return "products of floats" if in_floats and can_multiply_codes(quant.weights, quant.activations) else ARITHMETIC
