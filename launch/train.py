"""Train a low-bit student to predict what its full-precision teacher predicts.

deepspeed launch/train.py --deepspeed ds_configs/zero3.json --model DIR --data DIR --output DIR
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from launch import cli
from qat.data.sequences import Row, TrainingData
from qat.evaluate import heldout
from qat.evaluate.perplexity import text_windows
from qat.quant import linear
from qat.quant.config import CONFIG_FILE, QuantConfig
from qat.quant.learned_scales import check_codes_last, check_scales_can_learn
from qat.quant.prepare import prepare
from qat.quant.quantizers.base import Grid
from qat.quant.rotated import head_map_weight, rotation_of
from qat.runtime import memory, ranks
from qat.runtime.errors import UserError, check_least, differences
from qat.runtime.files import MANIFEST, check_partial, lock, using, write_atomically, writing
from qat.runtime.machine import be_deterministic, device, local_ranks
from qat.runtime.preemption import RESUMABLE_EXIT, StopSignal
from qat.store import models, student_folder
from qat.store.model_folder import ModelFolder, head_weight, read_config, shapes, skeleton
from qat.store.run_folder import CHECKPOINTS, FINAL, SETTINGS, TENSORBOARD
from qat.store.sidecars import save_tensor_scales
from qat.train import deepspeed_json, plan
from qat.train.checkpoint import checkpoints
from qat.train.config import TrainConfig, arithmetic_of
from qat.train.distill import Targets
from qat.train.losses import LOSSES
from qat.train.plan import Machine, Plan
from qat.train.teacher_cache import TeacherCache
from qat.train.validation import Texts

if TYPE_CHECKING:
    from transformers import PretrainedConfig
    from transformers import PreTrainedTokenizerBase as Tokenizer

CHANGES_NO_RESULT = ("save_every", "keep", "eval_every", "max_loss_ratio", "peak_flops")
"""Settings that may change when a run resumes."""

CHANGES_FROM_A_CHECKPOINT = ("steps", "min_lr_ratio", "decay_steps", "stop_when_flat")
"""Settings that may also differ from those of the run whose checkpoint a new one continues from."""


@dataclass(frozen=True)
class Paths:
    """The model, the data and the folder of the run.

    Args:
        model: the pretrained model, teacher and starting point: a Hugging Face directory or hub name
        student: another starting point: the output of launch/rotate.py or launch/quantize.py, or the final/ of an
            earlier run
        continue_from: checkpoint of another run (RUN/checkpoints/step-N) to branch from, optimizer state included; only
            steps and the learning rate's decay may differ
        data: folder of training shards, made by launch/generate.py
        output: folder of this run: checkpoints, log.jsonl, and the trained student in final/
        deepspeed: DeepSpeed configuration of the student
        teacher_deepspeed: DeepSpeed configuration of a sharded teacher; by default each rank holds all of the teacher
            if the plan says that it fits, else the student's, without optimizer
        teacher_cache: folder made by launch/cache_teacher.py or generate.py --teacher_cache; no teacher is loaded
    """

    model: str
    data: Path
    output: Path
    student: Path | None = None
    continue_from: Path | None = None
    deepspeed: Path = Path("ds_configs/zero3.json")
    teacher_deepspeed: Path | None = None
    teacher_cache: Path | None = None


@dataclass(frozen=True)
class HeldOut:
    """Held-out text for measuring the student's perplexity during training (every --eval_every steps); none by default.

    Args:
        eval_data: another folder of shards, made by launch/generate.py with another --seed
        eval_text: a text file, or encyclopedia or howto for built-in prose
        eval_window: tokens per window of eval_text
        eval_sequences: maximum number of sequences or windows
    """

    eval_data: Path | None = None
    eval_text: str | None = None
    eval_window: int = 512
    eval_sequences: int = 32

    def __post_init__(self) -> None:
        check_least(self, eval_window=2, eval_sequences=2)

    def read(self, tokenizer: "Tokenizer", data: TrainingData) -> Texts:
        """Return the token ids; raise UserError for a folder that is trained on."""
        texts = {}
        if self.eval_data:
            folder = TrainingData(self.eval_data, tokenizer, seed=0)
            if folder.fingerprint == data.fingerprint:
                raise UserError(
                    f"eval_data={self.eval_data} is the training data: generate other data, with another --seed."
                )
            numbers = range(min(len(folder), self.eval_sequences))
            texts["generated"] = [folder.sequence(number).input_ids for number in numbers]
        if self.eval_text:
            windows = text_windows(heldout.paragraphs(self.eval_text), tokenizer, self.eval_window, self.eval_sequences)
            texts["text"] = list(windows.split(1))
        return texts


def main() -> int:
    ranks.join(cli.rank(), cli.ranks())
    memory.let_segments_grow()
    paths, held_out, quant, config = cli.parse(__doc__, Paths, HeldOut, QuantConfig, TrainConfig)
    model = models.resolve_full_precision(paths.model)
    tokenizer = models.load_tokenizer(model)
    data = TrainingData(paths.data, tokenizer, config.seed)
    config = dataclasses.replace(config, steps=config.steps or len(data) // config.batch_size)
    if config.steps == 0:
        raise UserError(
            f"{paths.data} has {len(data)} sequences, fewer than batch_size={config.batch_size}: generate more."
        )
    check_schedule(config)
    texts = held_out.read(tokenizer, data)
    config_of_model = read_config(model)
    models.check_sequences(config_of_model, data.longest, data.largest, "data")
    for name, text in texts.items():
        longest, largest = max(ids.shape[1] for ids in text), int(torch.cat(text, 1).max())
        models.check_sequences(config_of_model, longest, largest, name)
    check_teacher(paths.teacher_cache, quant, config)
    begin = starting_point(paths.student, model, quant) if paths.student else model
    folder = ModelFolder.read(Path(begin))
    prepared = prepare(folder.skeleton(), quant)  # raises UserError for settings that do not fit the model
    is_rotated = rotation_of(folder.config) != rotation_of(config_of_model)
    if is_rotated and LOSSES[config.loss].needs_hidden_states:
        raise UserError(
            f"loss={config.loss} compares hidden states with the teacher's, and the student's are rotated: give "
            f"another loss, or --model {begin}."
        )
    if is_rotated and quant.measures_scales:
        raise UserError(
            f"{quant.measured_setting} takes its scales from the teacher's activations, and the student's are "
            f"rotated: give --model {begin}."
        )
    if config.trained.scales:
        check_scales_can_learn(prepared)
    grids = starting_grids(paths.student, quant, config) if paths.student else {}
    cache = None
    if paths.teacher_cache:
        cache = TeacherCache(paths.teacher_cache, config.loss)
        cache.check({"teacher": models.weights_fingerprint(model), "data": data.fingerprint})
        cache.check_complete(len(data), cli.rank(), cli.ranks())
        cache.check_loss()

    ds_settings = config.ds_settings(cli.ranks())
    student_json = deepspeed_json.resolve(paths.deepspeed, ds_settings)
    teacher_json = deepspeed_json.resolve(paths.teacher_deepspeed or paths.deepspeed, ds_settings)
    if not config.trained.weights:
        check_codes_last(prepared, deepspeed_json.dtype(student_json))
    student_json.setdefault("tensorboard", {"enabled": True, "output_path": str(paths.output), "job_name": TENSORBOARD})
    identity = {
        **quant.record(),
        **asdict(config),
        "model": models.weights_fingerprint(model),
        "student": models.weights_fingerprint(begin),
        "data": data.fingerprint,
        "teacher_cache": cache.fingerprint() if cache else None,
        "optimizer": student_json["optimizer"],
        "bf16": student_json.get("bf16"),
        "arithmetic": linear.arithmetic_of(quant),
    }
    trunk = None
    if paths.continue_from and (begun := continued_before(paths)):
        identity["continues"] = begun
    elif paths.continue_from:
        trunk = paths.continue_from.resolve().parent.parent
        identity["continues"] = check_continues(paths.continue_from, identity)
    open_folder(paths.output, identity)
    final = paths.output / FINAL
    if final.exists():
        cli.say(f"{final} already exists: the run is complete.")
        return 0
    cli.say(f"{quant} student of {model}: {config.steps} steps of {config.batch_size} sequences")

    companions = folder.companions()
    if config.deterministic:
        be_deterministic()
    from qat.train import engines  # with DeepSpeed, whose import no refusal above has to wait for
    from qat.train.loop import train

    engines.init_distributed()
    without_teacher = cache is not None or not LOSSES[config.loss].needs_teacher
    taught_by = None if without_teacher else teacher_json
    # No plan counts what a loss with records keeps. Ranks with different memory share one plan.
    room = 0.0 if LOSSES[config.loss].needs_records else engines.least(memory.of_rank())
    for_whole = 0.0 if without_teacher or paths.teacher_deepspeed else room
    planned = plan_of(config_of_model, student_json, taught_by, data.longest, config, quant, room, for_whole)
    if cli.is_first_rank():
        warn_if_short(planned)
    steps, scales = None, scales_of_run(trunk or paths.output, Path(begin), quant)
    if without_teacher:
        targets: Callable[[Row], Targets] = cache or engines.labels(config.loss)
    else:
        with ranks.doing("loading the teacher"):
            cli.say(
                f"The teacher is {'replicated on each rank' if planned.whole_teacher else 'sharded over the ranks'}."
            )
            teacher_json = deepspeed_json.for_teacher(teacher_json)
            targets = teacher = engines.Teacher(model, teacher_json, config.loss, planned.whole_teacher)
        if quant.activations.learned:
            ranks.announce("measuring activations")
            steps = teacher.initial_steps(Row.of(data.sample(cli.rank())).to(device()), quant)
        if quant.measures_scales and not ((trunk or paths.output) / SETTINGS).exists():
            ranks.announce("measuring activations")
            scales |= teacher.measured_scales(Row.of(data.sample(cli.rank())).to(device()), quant)
    with ranks.doing("loading the student"):
        student = engines.student_engine(
            begin,
            quant,
            student_json,
            config.lr_factor,
            config.gradient_checkpointing,
            steps,
            scales,
            config.train,
            grids,
            room_for_codes=planned.kept_codes,
        )
    if cli.is_first_rank():
        with writing(paths.output):
            save_tensor_scales(scales, paths.output)
        places = {"model": paths.model, "data": str(paths.data)} | ({"student": begin} if is_rotated else {})
        record_settings(paths.output, identity, student_json, places)
    stop = StopSignal()  # before this, a signal ends the process at once: there is nothing to save
    complete = train(student, targets, data, config, paths.output, stop, texts, paths.continue_from)
    if cli.is_first_rank():
        print(memory.beside_plan(planned.needs), flush=True)
    if complete:
        engines.save_student(student, final, quant, companions)
    stopped = f"stopped by a signal and saved: the same command resumes {paths.output}"
    cli.say(f"{final}: the trained student, {quant}" if complete else stopped)
    return 0 if complete else RESUMABLE_EXIT


def scales_of_run(output: Path, model: Path, quant: QuantConfig) -> dict[str, float]:
    """Return the scales of tensors that a run has fixed, or, if it is new, those that the first weights give."""
    if (output / SETTINGS).exists():
        return student_folder.scales_of(output, model, quant)
    return student_folder.weight_scales(model, quant)


def plan_of(
    model: "PretrainedConfig",
    student: dict[str, Any],
    teacher: dict[str, Any] | None,
    tokens: int,
    config: TrainConfig,
    quant: QuantConfig,
    room: float = 0.0,
    for_whole: float = 0.0,
) -> Plan:
    """Plan this run by the DeepSpeed JSONs of the student and of the teacher, if one is loaded, which is whole on each
    rank if a rank with ``for_whole`` bytes has room for it. Codes are kept in the rest of ``room`` bytes."""
    nodes = cli.ranks() // local_ranks()
    machine = Machine(gpus=cli.ranks(), nodes=nodes if nodes and cli.ranks() % nodes == 0 else 1)
    kind, checkpointing, packed = device().type, config.gradient_checkpointing, config.micro_batch_size
    given = (model, student, teacher, machine, tokens, kind, checkpointing, packed, quant)
    return plan.with_whole_teacher(for_whole, partial(plan.training, *given, memory=room))


def warn_if_short(planned: Plan) -> None:
    """Warn if this rank's device, or its host, has less memory than the plan needs."""
    advice = "launch/plan.py says which --deepspeed fits."
    memory.check_rank("training", planned.needs, advice)
    memory.check_host("training", planned.host, advice)


def starting_point(student: Path, model: str, quant: QuantConfig) -> str:
    """Return the directory of the student's initial weights; raise UserError if ``model`` cannot teach them."""
    found = None if is_rotated_model(student) else student_folder.find(student)
    if found and found.is_checkpoint:
        raise UserError(
            f"{student} is a checkpoint: give the final/ of a run, or the output of launch/rotate.py or "
            "launch/quantize.py."
        )
    directory = found.directory if found else Path(models.resolve_full_precision(str(student)))
    theirs, ours = shapes(skeleton(Path(model))), shapes(skeleton(directory))
    config = read_config(str(directory))
    more = {head_weight(config), head_map_weight(config)} if rotation_of(config) else set()
    if not theirs.items() <= ours.items() or not ours.keys() <= theirs.keys() | more:
        raise UserError(
            f"{student} was not made from {model}, as its weights have other names or shapes: give a student of that "
            "model."
        )
    teachers, own = models.load_tokenizer(model), models.load_tokenizer(str(directory))
    models.check_same_tokens(teachers, own, f"{model} and the student {student}")
    if quant.activations.learned:
        raise UserError(
            f"a_quantizer={quant.a_quantizer} initializes its learned step sizes from the teacher's activations: leave "
            "out --student."
        )
    if found and found.has_grids and quant.weights.quantizes and found.quant.weights != quant.weights:
        raise UserError(
            f"The weights of {student} are already rounded by {found.ptq_method or 'training'}, and other settings "
            f"would round them again: give its w_bits={found.quant.w_bits}, w_quantizer={found.quant.w_quantizer}, "
            f"w_group_size={found.quant.weights.group_size}, w_scale_dtype={found.quant.w_scale_dtype}."
        )
    return str(directory)


def is_rotated_model(student: Path) -> bool:
    """Return whether a folder is a full-precision model that launch/rotate.py wrote."""
    is_model = (student / "config.json").is_file() and not (student / CONFIG_FILE).is_file()
    return is_model and rotation_of(read_config(str(student))) is not None


def starting_grids(student: Path, quant: QuantConfig, config: TrainConfig) -> dict[str, Grid]:
    """Return the grids, by layer, with which the student's scales begin: those stored beside its weights. None if there
    are none, or if scales do not learn: then grids follow from the weights' values."""
    if is_rotated_model(student) or not (found := student_folder.find(student)).has_grids:
        return {}
    if not config.trained.scales:
        cli.say(f"train=weights ignores the weight grids of {student} and computes new ones from its rounded weights.")
        return {}
    if found.quant.overrides != quant.overrides:
        raise UserError(
            f"The weight grids of {student} are for overrides={found.quant.overrides!r}: give the same overrides."
        )
    return found.grids()


def check_teacher(cache: Path | None, quant: QuantConfig, config: TrainConfig) -> None:
    """Raise UserError for settings that need a teacher, if there is none."""
    loss = LOSSES[config.loss]
    if cache and not loss.needs_teacher:
        raise UserError(f"loss={config.loss} needs no teacher, so --teacher_cache does not apply: leave it out.")
    if cache and loss.needs_records:
        raise UserError(
            f"loss={config.loss} needs more of the teacher than the predictions in a --teacher_cache: leave it out."
        )
    if quant.activations.learned and config.micro_batch_size > 1:
        raise UserError(
            f"a_quantizer={quant.a_quantizer} scales the gradients of its steps by the tokens of a forward pass, so "
            "packed sequences would train differently from single ones: give --micro_batch_size 1."
        )
    if quant.activations.learned and (cache or not loss.needs_teacher):
        raise UserError(
            f"a_quantizer={quant.a_quantizer} initializes its learned step sizes from the teacher's activations: give "
            "a loss that runs the teacher, and no --teacher_cache."
        )
    if quant.measures_scales and (cache or not loss.needs_teacher):
        raise UserError(
            f"{quant.measured_setting} takes its scales from the teacher's activations: give a loss that runs the "
            "teacher, and no --teacher_cache."
        )


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


def continued_before(paths: Paths) -> str | None:
    """Return what identified the checkpoint that the run continued from, if that is gone and the run has saved its
    own."""
    if not paths.continue_from or (paths.continue_from / MANIFEST).is_file():
        return None
    own = [path for path in checkpoints(paths.output / CHECKPOINTS) if (path / MANIFEST).is_file()]
    if not own and not (paths.output / FINAL).exists():
        return None
    return student_folder.run_settings(paths.output).get("settings", {}).get("continues")


def check_continues(folder: Path, settings: dict[str, Any]) -> str:
    """Return what identifies the checkpoint in ``folder``; raise UserError if there is none, or if a run with
    ``settings`` cannot continue from it."""
    if not (folder / MANIFEST).is_file():
        raise UserError(f"{folder} is not a checkpoint: give RUN/checkpoints/step-N, of a run that kept it.")
    run = folder.resolve().parent.parent
    theirs = student_folder.run_settings(run).get("settings")
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


def _schedule_of(settings: dict[str, Any]) -> TrainConfig:
    return TrainConfig(**{field.name: settings[field.name] for field in dataclasses.fields(TrainConfig)})


def _defaults() -> dict[str, Any]:
    """Return the settings that an earlier version may not have recorded, as they were without being known."""
    return QuantConfig().record() | {
        field.name: field.default
        for field in dataclasses.fields(TrainConfig)
        if field.default is not dataclasses.MISSING
    }


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


def open_folder(output: Path, settings: dict[str, Any]) -> None:
    """Check that the folder can be written to, and that a run in it is resumed with the settings that it was started
    with.

    The first rank holds a lock on the folder until it ends, so that no two runs work in one.
    """
    if cli.is_first_rank():
        lock(output)
        check_partial(output / FINAL)
    path = output / SETTINGS
    if path.exists():
        started = student_folder.run_settings(output)["settings"]
        check_arithmetic(output, started, "would not resume with the same losses", "give another --output")
        free = {name: settings[name] for name in CHANGES_NO_RESULT}
        began = _defaults() | started | free
        if listed := differences(_compared(began), _compared(settings)):
            raise UserError(f"{output} was started with other settings ({listed}): give the same, or another --output.")
    elif (output / FINAL).exists() or checkpoints(output / CHECKPOINTS):
        raise UserError(f"{output} holds a run without its {SETTINGS}: restore it, or give another --output.")


def _compared(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings without what follows from others: the optimizer's copy of the learning rate, and the
    arithmetic."""
    settings = {name: value for name, value in settings.items() if name != "arithmetic"}
    match settings.get("optimizer"):
        case {"params": {**params}, **optimizer}:
            return settings | {"optimizer": optimizer | {"params": params | {"lr": None}}}
    return settings


def record_settings(output: Path, settings: dict[str, Any], ds_config: dict[str, Any], places: dict[str, str]) -> None:
    """Record the settings of the run once it is ready to take its first step: a mistake that is rejected earlier leaves
    the folder free. ``places`` are the paths where model and data were found; they may move."""
    path = output / SETTINGS
    if path.exists():
        return
    with writing(output):
        write_atomically(path, json.dumps({"settings": settings, "deepspeed": ds_config, **places}, indent=2) + "\n")


if __name__ == "__main__":
    cli.run(main)
