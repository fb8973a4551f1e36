"""The training loop."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from qat.data.sequences import Row, TrainingData
from qat.quant.config import QuantConfig
from qat.quant.linear import ARITHMETIC, can_multiply_codes
from qat.runtime import ranks
from qat.runtime.errors import UserError, check_least
from qat.runtime.machine import Moment, device, send
from qat.runtime.preemption import StopSignal
from qat.runtime.table import check_choices, choice
from qat.train import checkpoint, engines, flat, flops
from qat.train.checkpoint import TrainState
from qat.train.distill import Targets
from qat.train.engines import Teacher
from qat.train.log import PERPLEXITY, RunLog
from qat.train.losses import LOSSES
from qat.train.validation import Texts, perplexities

if TYPE_CHECKING:
    import deepspeed

SETTINGS, CHECKPOINTS, LOG, TENSORBOARD, FINAL = "settings.json", "checkpoints", "log.jsonl", "tensorboard", "final"
"""Names in a run's folder: its settings, its checkpoints, one JSON line per step, the same for TensorBoard, and the
trained student."""

TRAINED = {
    "weights": "all weights; the scales of their grids follow from their values at every step",
    "all": "all weights, and the scales of their grids, which begin with those of the starting point (LSQ)",
    "scales": "the scales alone; the codes of the weights stay as they begin",
}
"""What ``TrainConfig.train`` can be."""

_STEPS_BEFORE_JUDGING = 20
"""Number of steps that the loss is averaged over, and that must have been taken before a loss is called exploding."""


@dataclass(frozen=True)
class TrainConfig:
    """The student's training: AdamW without weight decay, by single sequences. The defaults are the paper's.

    Args:
        loss: what the student minimises
        train: which Parameters of the student learn
        steps: optimizer steps; 0 for one pass over the data
        lr: peak learning rate
        warmup_steps: steps of linear warm-up before the cosine
        min_lr_ratio: the cosine ends at this fraction of lr
        decay_steps: the cosine takes this many steps at the end, and lr is constant before; 0: all steps after warm-up
        stop_when_flat: judge the KL every so many steps at constant lr; if it no longer falls, the decay_steps follow,
            and the run ends; 0 never does
        batch_size: sequences per optimizer step, over all ranks, however many there are (the paper: one on each of 8
            GPUs)
        micro_batch_size: sequences that a rank packs into one row of a forward pass, without padding; each attends to
            itself alone, and the result is the same as one at a time; must divide a rank's share
        gradient_clipping: largest global gradient norm; 0 clips nothing
        gradient_checkpointing: recompute activations in backward: less memory, a third more time
        save_every: steps between checkpoints
        keep: how many checkpoints to keep
        eval_every: steps between measurements of the perplexity on held-out sequences, where some are given
        max_loss_ratio: stop if a step's loss is more than this many times its average; 0 never does
        peak_flops: FLOP/s that one device can do (989e12 for bf16 on an H100): logs the model FLOP utilisation
        deterministic: on GPUs, a resumed run continues bit for bit; slower (docs/gpu/). CPUs always do so
        seed: of the order of the data
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
        if self.stop_when_flat and self.stop_when_flat < flat.FEWEST:
            raise UserError(
                f"stop_when_flat={self.stop_when_flat} is invalid: choose 0, or {flat.FEWEST} or more steps, say 100."
            )
        if self.stop_when_flat and not self.decay_steps:
            raise UserError(
                "stop_when_flat judges steps at constant lr, and with decay_steps=0 there are none: give decay_steps "
                "too, say a fifth of the steps."
            )
        if not 0 < self.lr < 1:
            raise UserError(f"lr={self.lr} is invalid: choose a learning rate above 0 and below 1, say 2e-5.")

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


def train(
    student: "deepspeed.DeepSpeedEngine",
    teacher: Callable[[Row], Targets],
    data: TrainingData,
    config: TrainConfig,
    run: Path,
    stop: StopSignal,
    held_out: Texts,
    begin: Path | None = None,
) -> bool:
    """Train to the end from the run's last complete checkpoint; return False if a signal stopped it before.

    The figures of a step are read while the next one runs, so that no rank waits for its GPU in between; they are read
    at once where something depends on them: a checkpoint, a measurement, a judgement of the KL, the end.

    Args:
        begin: checkpoint of another run, from which a new run continues
    """
    state = checkpoint.resume(student, run / CHECKPOINTS, begin)
    config = _shortened(config, state, student)
    unread: Taken | None = None
    stopped = False
    with RunLog(run / LOG, student, state, config.steps) if dist.get_rank() == 0 else nullcontext() as log:
        while state.step < config.steps and not stopped:
            taken = take_step(student, teacher, data, config, unread or state, stop)
            if unread:
                figures, stopped = read(unread, config, state, run / CHECKPOINTS)
                if log is not None:
                    log.step(state, figures)
            unread = taken
            last = taken.step == config.steps
            due = held_out and taken.step // config.eval_every > state.measured // config.eval_every
            judged = (
                _counts(taken.step, config, state) and not (taken.step - config.warmup_steps) % config.stop_when_flat
            )
            if not (stopped or last or due or judged or taken.step % config.save_every == 0):
                continue
            unread, told_before = None, stopped
            figures, stopped = read(taken, config, state, run / CHECKPOINTS)
            stopped |= told_before
            if judged and flat.found(state, config.stop_when_flat):
                config = _shortened(config, state, student)
                if log is not None:
                    log.ends_early(state, config.steps)
            if held_out and (last or (due and not stopped)):  # a stopped run saves first, and measures later
                figures |= {PERPLEXITY + name: ppl for name, ppl in perplexities(student, held_out, device()).items()}
                state.measured = state.step
            if log is not None:
                log.step(state, figures)
            if state.step % config.save_every == 0 or last or stopped:
                checkpoint.save(student, run / CHECKPOINTS, state, config.keep)
    return state.step == config.steps


def _counts(step: int, config: TrainConfig, state: TrainState) -> bool:
    """Return whether a step is among those by which ``stop_when_flat`` judges: at constant learning rate."""
    judging = config.stop_when_flat and not state.flat_at
    return bool(judging) and config.warmup_steps < step < config.steps - config.decay_steps


def _shortened(config: TrainConfig, state: TrainState, student: deepspeed.DeepSpeedEngine) -> TrainConfig:
    """Return the settings of a run that ends early because its KL was found flat, and let the student's learning rate
    follow them."""
    if state.flat_at and config.stop_when_flat:
        config = replace(config, steps=state.flat_at + config.decay_steps)
        engines.follow(student, config.lr_factor)
    return config


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
    quant = QuantConfig(**{name: settings[name] for name in QuantConfig().record() if name in settings})
    in_floats = record.is_file() and record.read_text() == "floats"
    return "products of floats" if in_floats and can_multiply_codes(quant.weights, quant.activations) else ARITHMETIC


@dataclass(frozen=True)
class Taken:
    """An optimizer step whose figures may still be on their way from the device.

    Args:
        step, samples: as TrainState's, after it
        lr: its learning rate
        figures: summed over all ranks and sequences: loss, KL, tokens, FLOPs, signals to stop; and the gradient norm
        began, ended: on the device
    """

    step: int
    samples: int
    lr: float
    figures: Tensor
    began: Moment
    ended: Moment


def take_step(
    student: "deepspeed.DeepSpeedEngine",
    teacher: Callable[[Row], Targets],
    data: TrainingData,
    config: TrainConfig,
    after: TrainState | Taken,
    stop: StopSignal,
) -> Taken:
    """Take one optimizer step on the ``config.batch_size`` samples that follow, without waiting for the device."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    began, lr, samples = Moment(), student.get_lr()[0], after.samples
    learned = torch.zeros(2, dtype=torch.float64, device=device())  # loss, KL
    done = [0.0, 0.0]  # tokens, FLOPs
    size = config.micro_batch_size
    for _ in range(config.batch_size // world_size // size):
        ranks.announce("reading a sample", after.step + 1)
        numbers = range(samples + rank, samples + size * world_size, world_size)
        row = Row.of(*map(data.sample, numbers)).to(device())
        torch.manual_seed(config.seed + numbers[0])  # dropout, where a model has it, belongs to the sample
        ranks.announce("forward and backward")
        loss, kl = student(row.input_ids, teacher(row))
        student.backward(loss)
        if student.is_gradient_accumulation_boundary():
            ranks.announce("optimizer step")
        student.step()
        learned += size * torch.stack([loss.detach(), kl])
        del loss  # and its graph, before the next one is made
        for tokens in row.predicted:
            done[0] += tokens
            done[1] += flops.distillation(student.module.student.config, tokens, isinstance(teacher, Teacher))
        samples += size * world_size
    figures = torch.cat([learned, send(torch.tensor([*done, stop.received], dtype=torch.float64), device())])
    dist.all_reduce(figures)
    norm = torch.as_tensor(student.get_global_grad_norm(), dtype=torch.float64, device=device())
    figures = torch.cat([figures, norm.view(1)]).to("cpu", non_blocking=True)
    return Taken(after.step + 1, samples, lr, figures, began, ended=Moment())


def read(taken: Taken, config: TrainConfig, state: TrainState, checkpoints: Path) -> tuple[dict[str, float], bool]:
    """Wait for the figures of a step; bring ``state``, which is that of the step before, up to it.

    Returns the figures, and whether any rank must stop. Raises UserError, on all ranks alike, as ``check_sane`` does.
    """
    seconds = taken.ended.since(taken.began)  # waits; only then are the figures there
    loss_sum, kl_sum, token_sum, flops_sum, told_to_stop, norm = taken.figures.tolist()
    state.step, state.samples = taken.step, taken.samples
    state.tokens += int(token_sum)
    state.seconds += seconds
    figures = {
        "loss": loss_sum / config.batch_size,
        **({} if config.loss == "label" else {"kl": kl_sum / config.batch_size}),  # KL needs a teacher
        "lr": taken.lr,
        "grad_norm": norm,
        "tokens_per_second": round(token_sum / seconds, 1),
    }
    if config.peak_flops:
        figures["mfu"] = round(flops_sum / seconds / (dist.get_world_size() * config.peak_flops), 4)
    check_sane(figures, config, state, checkpoints)
    update_average(state, figures["loss"])
    if _counts(state.step, config, state):
        state.recent.append(figures.get("kl", figures["loss"]))
    return figures, told_to_stop > 0


def check_sane(figures: dict[str, float], config: TrainConfig, state: TrainState, checkpoints: Path) -> None:
    """Raise UserError, on all ranks alike, for a loss or gradient that is not finite, or a loss that explodes."""
    loss, norm = figures["loss"], figures["grad_norm"]
    advice = f"The last good checkpoint is {checkpoint.latest(checkpoints)}; a lower lr or a longer warm-up may help."
    if not math.isfinite(loss) or not math.isfinite(norm):
        raise UserError(f"At step {state.step} the loss is {loss} and the gradient norm {norm}. {advice}")
    known = state.step > _STEPS_BEFORE_JUDGING
    if config.max_loss_ratio and known and loss > config.max_loss_ratio * state.average_loss:
        raise UserError(
            f"At step {state.step} the loss is {loss:.3g}, more than max_loss_ratio={config.max_loss_ratio:g} times "
            f"its average of {state.average_loss:.3g}. {advice}"
        )


def update_average(state: TrainState, loss: float) -> None:
    """Update the running average that ``check_sane`` compares with by the loss of the step just taken."""
    weight = max(1 / state.step, 1 / _STEPS_BEFORE_JUDGING)
    state.average_loss += weight * (loss - state.average_loss)
