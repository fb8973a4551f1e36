"""The training loop."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from qat.data.sequences import Row, TrainingData
from qat.runtime import malloc, ranks
from qat.runtime.errors import UserError
from qat.runtime.machine import Moment, device, send
from qat.runtime.preemption import StopSignal
from qat.store.run_folder import CHECKPOINTS, LOG
from qat.train import checkpoint, engines, flops, plateau
from qat.train.checkpoint import TrainState
from qat.train.config import TrainConfig
from qat.train.distill import Targets
from qat.train.engines import Teacher
from qat.train.log import PERPLEXITY, RunLog
from qat.train.losses import LOSSES
from qat.train.validation import Texts, perplexities

if TYPE_CHECKING:
    import deepspeed

_STEPS_BEFORE_JUDGING = 20
"""Number of steps that the loss is averaged over, and that must have been taken before a loss is called exploding."""

_STEPS_OF_FREED_MEMORY = 50
"""Number of steps after which a rank returns freed memory to the kernel. Getting it again takes a step about half a
second."""


def train(
    student: deepspeed.DeepSpeedEngine,
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
            if taken.step % _STEPS_OF_FREED_MEMORY == 0:
                malloc.return_freed_memory()
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
            if judged and plateau.found(state, config.stop_when_flat):
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
    student: deepspeed.DeepSpeedEngine,
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
    model = student.module.student
    matrices = flops.matrix_elements(model)
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
            done[1] += flops.distillation(model.config, matrices, tokens, isinstance(teacher, Teacher))
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
        **({"kl": kl_sum / config.batch_size} if LOSSES[config.loss].needs_teacher else {}),
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
