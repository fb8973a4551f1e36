"""What a run records of itself, and which other run may resume it or continue from its checkpoints."""

import dataclasses
import hashlib
import json
import math
from pathlib import Path
from typing import Any

from qat.quant import linear
from qat.quant.config import QuantConfig
from qat.runtime.errors import UserError, differences
from qat.runtime.files import MANIFEST, check_partial, lock, using, write_atomically, writing
from qat.store import student_folder
from qat.store.run_folder import CHECKPOINTS, FINAL, SETTINGS
from qat.train import deepspeed_json
from qat.train.checkpoint import checkpoints
from qat.train.config import TrainConfig, arithmetic_of

CHANGES_NO_RESULT = ("save_every", "keep", "eval_every", "max_loss_ratio", "peak_flops")
"""Settings that may change when a run resumes."""

CHANGES_FROM_A_CHECKPOINT = ("steps", "min_lr_ratio", "decay_steps", "stop_when_flat")
"""Settings that may also differ from those of the run whose checkpoint a new one continues from."""


def check_schedule(config: TrainConfig, taken: int = 0) -> None:
    """Raise UserError for a schedule whose parts do not fit into the steps after the ``taken`` ones of another run."""
    most = config.steps - max(config.warmup_steps, taken)
    if config.decay_steps > max(0, most):
        raise UserError(
            f"decay_steps={config.decay_steps} exceeds the {most} of {config.steps} steps left after "
            f"{'the checkpoint' if taken > config.warmup_steps else 'the warm-up'}: use at most {most}, or more "
            "--steps."
        )
    if not (judged := config.stop_when_flat):
        return
    windows_before = max(0, math.ceil((taken - config.warmup_steps) / judged))
    first, constant = config.warmup_steps + (windows_before + 1) * judged, config.steps - config.decay_steps
    if first >= constant:
        raise UserError(
            f"stop_when_flat={judged} would first test the KL at step {first}, but the learning rate decays from step "
            f"{constant}: give a smaller stop_when_flat, or more than {first + config.decay_steps} --steps."
        )


def of(checkpoint: Path) -> Path:
    """Return the folder of a checkpoint's run."""
    return checkpoint.resolve().parent.parent


def continued_before(checkpoint: Path, output: Path) -> str | None:
    """Return what identified the checkpoint that the run in ``output`` continued from, if that is gone and the run has
    saved its own."""
    if (checkpoint / MANIFEST).is_file():
        return None
    own = [path for path in checkpoints(output / CHECKPOINTS) if (path / MANIFEST).is_file()]
    if not own and not (output / FINAL).exists():
        return None
    return student_folder.run_settings(output).get("settings", {}).get("continues")


def check_continues(folder: Path, settings: dict[str, Any], ds_config: dict[str, Any]) -> str:
    """Return what identifies the checkpoint in ``folder``; raise UserError if there is none, or if a run with
    ``settings`` and the student's DeepSpeed JSON cannot continue from it."""
    if not (folder / MANIFEST).is_file():
        raise UserError(f"{folder} is not a checkpoint: give RUN/checkpoints/step-N, of a run that kept it.")
    run = of(folder)
    record = student_folder.run_settings(run)
    theirs = record.get("settings")
    if theirs is None:
        raise UserError(f"{run} holds a checkpoint without its {SETTINGS}: restore it.")
    check_arithmetic(run, theirs, "its checkpoint does not continue here", "give another checkpoint")
    theirs = {key: value for key, value in theirs.items() if key != "continues"}
    free = {name: settings[name] for name in (*CHANGES_NO_RESULT, *CHANGES_FROM_A_CHECKPOINT)}
    if listed := differences(_compared(_defaults() | theirs | free), _compared(settings)):
        raise UserError(
            f"{folder} is of a run with other settings ({listed}): give the same, except for "
            f"{', '.join(CHANGES_FROM_A_CHECKPOINT)}."
        )
    if listed := _other_layout(record, ds_config):
        raise UserError(
            f"{folder} is of a run with another --deepspeed, whose checkpoints cannot be loaded with this one "
            f"({listed}): give the same."
        )
    taken = int(folder.resolve().name.removeprefix("step-"))
    if taken >= settings["steps"]:
        raise UserError(f"{folder} has taken {taken} steps already: give more --steps, which count from the beginning.")
    ours, began = _schedule_of(settings), _schedule_of(_defaults() | theirs)
    check_schedule(ours, taken)
    before, after = began.lr_factor(taken), ours.lr_factor(taken)
    if not math.isclose(before, after, rel_tol=1e-6, abs_tol=1e-6):
        raise UserError(
            f"After {folder} the learning rate would jump from {before:.3g} to {after:.3g} of lr: give --decay_steps "
            f"{ours.steps - taken} or fewer and a checkpoint of constant learning rate, or the schedule of its run."
        )
    return hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()[:16]


def _other_layout(record: dict[str, Any], ds_config: dict[str, Any]) -> str:
    """Return the differences between a run's DeepSpeed JSON and ``ds_config`` that its checkpoints depend on."""
    before, now = (deepspeed_json.layout(given) for given in (record.get("deepspeed", ds_config), ds_config))
    return differences(before, now)


def check_arithmetic(run: Path, settings: dict[str, Any], consequence: str, advice: str) -> None:
    """Raise UserError if the run in a folder was begun, with ``settings``, by a version that computed differently."""
    with using(run / SETTINGS):
        began_with = arithmetic_of(settings, run)
        today = linear.arithmetic_of(QuantConfig(**QuantConfig.among(settings)))
    if began_with != today:
        raise UserError(
            f"{run} was begun by a version that computed differently ({began_with}; now {today}), and {consequence}: "
            f"finish it with that version, or {advice}."
        )


def open_folder(output: Path, settings: dict[str, Any], ds_config: dict[str, Any], is_first_rank: bool = True) -> None:
    """Check that the folder can be written to, and that a run in it is resumed with the settings that it was started
    with, and with a student's DeepSpeed JSON whose checkpoints are the same.

    The first rank holds a lock on the folder until it ends, so that no two runs work in one.
    """
    if is_first_rank:
        lock(output)
        check_partial(output / FINAL)
    path = output / SETTINGS
    if path.exists():
        record = student_folder.run_settings(output)
        started = record["settings"]
        check_arithmetic(output, started, "would not resume with the same losses", "give another --output")
        free = {name: settings[name] for name in CHANGES_NO_RESULT}
        began = _defaults() | started | free
        if listed := differences(_compared(began), _compared(settings)):
            raise UserError(f"{output} was started with other settings ({listed}): give the same, or another --output.")
        if not (output / FINAL).exists() and (listed := _other_layout(record, ds_config)):
            raise UserError(
                f"{output} was started with another --deepspeed, whose checkpoints cannot be loaded with this one "
                f"({listed}): give the same, or another --output."
            )
    elif (output / FINAL).exists() or checkpoints(output / CHECKPOINTS):
        raise UserError(f"{output} holds a run without its {SETTINGS}: restore it, or give another --output.")


def record_settings(output: Path, settings: dict[str, Any], ds_config: dict[str, Any], places: dict[str, str]) -> None:
    """Record the settings of the run once it is ready to take its first step: a mistake that is rejected earlier leaves
    the folder free. ``places`` are the paths where model and data were found; they may move."""
    path = output / SETTINGS
    if path.exists():
        return
    with writing(output):
        write_atomically(path, json.dumps({"settings": settings, "deepspeed": ds_config, **places}, indent=2) + "\n")


def _schedule_of(settings: dict[str, Any]) -> TrainConfig:
    return TrainConfig(**{field.name: settings[field.name] for field in dataclasses.fields(TrainConfig)})


def _defaults() -> dict[str, Any]:
    """Return the settings that an earlier version may not have recorded, as they were without being known."""
    return QuantConfig().record() | {
        field.name: field.default
        for field in dataclasses.fields(TrainConfig)
        if field.default is not dataclasses.MISSING
    }


def _compared(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings without what follows from others: the optimizer's copy of the learning rate, and the
    arithmetic."""
    settings = {name: value for name, value in settings.items() if name != "arithmetic"}
    match settings.get("optimizer"):
        case {"params": {**params}, **optimizer}:
            return settings | {"optimizer": optimizer | {"params": params | {"lr": None}}}
    return settings
