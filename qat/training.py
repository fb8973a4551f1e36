"""The training loop."""

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from tqdm import tqdm

from qat import checkpoint
from qat.checkpoint import TrainState
from qat.data import Sample, TrainingData
from qat.distill import LOSSES, Targets
from qat.engines import device
from qat.errors import UserError
from qat.files import write_atomically
from qat.preemption import StopSignal

SETTINGS, CHECKPOINTS, LOG, FINAL = "settings.json", "checkpoints", "log.jsonl", "final"
"""What a run's folder holds: what it is, DeepSpeed checkpoints, one JSON line a step, the trained student."""


@dataclass(frozen=True)
class TrainConfig:
    """How the student learns: AdamW without weight decay, one sequence per rank. The defaults are the paper's.

    Args:
        loss: logits (cross-entropy with the teacher's distribution: the paper's choice), label (with the next token),
            logits+hidden or logits+attention (its comparison: hidden states or attention maps are matched too)
        steps: optimizer steps; 0 for one pass over the data
        lr: peak learning rate
        warmup_steps: steps of linear warm-up before the cosine
        min_lr_ratio: the cosine ends at this fraction of lr
        gradient_accumulation_steps: sequences per rank and optimizer step
        gradient_clipping: largest global gradient norm; 0 clips nothing
        gradient_checkpointing: recompute activations in backward: less memory, a third more time
        save_every: steps between checkpoints
        keep: how many checkpoints to keep
        seed: of the order of the data
    """

    loss: str = "logits"
    steps: int = 0
    lr: float = 2e-5
    warmup_steps: int = 0
    min_lr_ratio: float = 0.0
    gradient_accumulation_steps: int = 1
    gradient_clipping: float = 1.0
    gradient_checkpointing: bool = True
    save_every: int = 500
    keep: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise UserError(f"loss={self.loss!r} is not possible: give {', '.join(LOSSES)}.")
        for name in ("steps", "warmup_steps", "min_lr_ratio", "gradient_clipping"):
            if getattr(self, name) < 0:
                raise UserError(f"{name}={getattr(self, name)} is not possible: give 0 or more.")
        for name in ("gradient_accumulation_steps", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} is not possible: give 1 or more.")
        if not 0 < self.lr < 1:
            raise UserError(f"lr={self.lr} is not possible: give a learning rate above 0 and below 1, say 2e-5.")

    def lr_factor(self, step: int) -> float:
        """Learning rate of optimizer step ``step`` (from 0) over ``lr``: linear warm-up, then a cosine."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.min_lr_ratio + (1 - self.min_lr_ratio) * (1 + math.cos(math.pi * min(progress, 1.0))) / 2

    def ds_settings(self, ranks: int) -> dict[str, object]:
        """What a DeepSpeed JSON must not contradict, by its dotted keys."""
        return {
            "train_batch_size": ranks * self.gradient_accumulation_steps,
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": self.gradient_accumulation_steps,
            "gradient_clipping": self.gradient_clipping,
            "optimizer.type": "AdamW",
            "optimizer.params.lr": self.lr,
            "optimizer.params.weight_decay": 0.0,
        }


def train(
    student: deepspeed.DeepSpeedEngine,
    teacher: Callable[[Sample], Targets],
    data: TrainingData,
    config: TrainConfig,
    run: Path,
) -> bool:
    """Train to ``config.steps`` from the run's latest checkpoint; False if a signal stopped it before."""
    rank, ranks, stop = dist.get_rank(), dist.get_world_size(), StopSignal()
    state = checkpoint.resume(student, run / CHECKPOINTS)
    log = _Log(run / LOG, state, config.steps) if rank == 0 else None
    stopped = False
    while state.step < config.steps and not stopped:
        began, lr = time.monotonic(), student.get_lr()[0]
        sums = torch.zeros(4, device=device())  # loss, KL, tokens, ranks told to stop
        for _ in range(config.gradient_accumulation_steps):
            sample = data.sample(state.samples + rank).to(device())
            loss, kl = student(sample.input_ids, teacher(sample))
            student.backward(loss)
            student.step()
            sums[:2] += torch.stack([loss.detach(), kl])
            sums[2] += sample.input_ids.shape[1] - 1
            state.samples += ranks
        sums[3] = stop.received
        dist.all_reduce(sums)
        loss_sum, kl_sum, tokens, told_to_stop = sums.tolist()
        stopped = told_to_stop > 0
        state.step += 1
        state.tokens += int(tokens)
        state.seconds += time.monotonic() - began
        if log is not None:
            sequences = ranks * config.gradient_accumulation_steps
            log.step(state, loss_sum / sequences, kl_sum / sequences, lr, student.get_global_grad_norm())
        if state.step % config.save_every == 0 or state.step == config.steps or stopped:
            checkpoint.save(student, run / CHECKPOINTS, state, config.keep)
    return state.step == config.steps


class _Log:
    """One JSON line a step, and a progress bar with rate and ETA."""

    def __init__(self, path: Path, state: TrainState, steps: int):
        records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        kept = [record for record in records if record["step"] <= state.step]  # those after it are taken again
        write_atomically(path, "".join(json.dumps(record) + "\n" for record in kept))
        self._file = path.open("a", buffering=1)
        self._bar = tqdm(desc="train", total=steps, initial=state.step, unit="step", dynamic_ncols=True)

    def step(self, state: TrainState, loss: float, kl: float, lr: float, grad_norm: float) -> None:
        record = {
            "step": state.step,
            "loss": loss,
            "kl": kl,
            "lr": lr,
            "grad_norm": float(grad_norm),
            "tokens": state.tokens,
            "seconds": round(state.seconds, 2),
        }
        self._file.write(json.dumps(record) + "\n")
        self._bar.set_postfix(loss=f"{loss:.3f}", kl=f"{kl:.3f}", tok_s=f"{state.tokens / state.seconds:.0f}")
        self._bar.update()
