"""Train a low-bit student to predict what its full-precision teacher predicts.

deepspeed launch/train.py --deepspeed ds_configs/zero3.json --model DIR --data DIR --output DIR
"""

import dataclasses
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
from qat.quant.config import QuantConfig
from qat.quant.learned_scales import check_codes_last, check_scales_can_learn
from qat.quant.prepare import prepare
from qat.quant.quantizers.base import Grid
from qat.quant.rotated import rotation_of
from qat.runtime import memory, ranks
from qat.runtime.errors import UserError, check_least
from qat.runtime.files import writing
from qat.runtime.machine import be_deterministic, device, local_ranks
from qat.runtime.preemption import RESUMABLE_EXIT, StopSignal
from qat.store import models, student_folder
from qat.store.model_folder import ModelFolder, read_config
from qat.store.run_folder import FINAL, SETTINGS, TENSORBOARD
from qat.store.sidecars import save_tensor_scales
from qat.train import deepspeed_json, plan, run, starting_point
from qat.train.config import TrainConfig
from qat.train.distill import Targets
from qat.train.losses import LOSSES
from qat.train.plan import Machine, Plan
from qat.train.teacher_cache import TeacherCache
from qat.train.validation import Texts

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel
    from transformers import PreTrainedTokenizerBase as Tokenizer


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


@dataclass(frozen=True)
class Inputs:
    """What a run reads, checked to fit together.

    Attributes:
        model: directory of the teacher
        start: the model with the student's initial weights
        prepared: that model, quantized and without weights
        is_rotated: whether those are of a rotation that the teacher does not have
        grids: initial grids of scales that learn, by layer, if they are stored with the initial weights
        data: the training sequences
        texts: held-out sequences
        cache: the teacher's predictions, if no teacher is loaded for them
    """

    model: str
    start: ModelFolder
    prepared: "PreTrainedModel"
    is_rotated: bool
    grids: dict[str, Grid]
    data: TrainingData
    texts: Texts
    cache: TeacherCache | None


def main() -> int:
    ranks.join(cli.rank(), cli.ranks())
    memory.let_segments_grow()
    paths, held_out, quant, config = cli.parse(__doc__, Paths, HeldOut, QuantConfig, TrainConfig)
    inputs, config = read_inputs(paths, held_out, quant, config)
    student_json, teacher_json = read_deepspeed(paths, config, inputs)
    settings, trunk = settings_of(paths, quant, config, inputs, student_json)
    run.open_folder(paths.output, settings, student_json, cli.is_first_rank())
    final = paths.output / FINAL
    if final.exists():
        cli.say(f"{final} already exists: the run is complete.")
        return 0
    cli.say(f"{quant} student of {inputs.model}: {config.steps} steps of {config.batch_size} sequences")

    companions = inputs.start.companions()
    if config.deterministic:
        be_deterministic()
    from qat.train import engines  # with DeepSpeed, whose import no refusal above has to wait for
    from qat.train.loop import train

    engines.init_distributed()
    engines.check_shared(paths.output)
    on_nvme = {folder for each in (student_json, teacher_json) for folder in deepspeed_json.nvme_folders(each)}
    engines.empty(on_nvme)
    planned = plan_with_others(paths, quant, config, inputs, student_json, teacher_json)
    scales, steps = scales_of_run(trunk or paths.output, inputs.start.directory, quant), None
    if not runs_teacher(config, inputs):
        targets: Callable[[Row], Targets] = inputs.cache or engines.labels(config.loss)
    else:
        with ranks.doing("loading the teacher"):
            cli.say(
                f"The teacher is {'replicated on each rank' if planned.whole_teacher else 'sharded over the ranks'}."
            )
            teacher_json = deepspeed_json.for_teacher(teacher_json)
            targets = teacher = engines.Teacher(inputs.model, teacher_json, config.loss, planned.whole_teacher)
        first = Row.of(inputs.data.sample(cli.rank())).to(device())
        if quant.activations.learned:
            ranks.announce("measuring activations")
            steps = teacher.initial_steps(first, quant)
        if quant.measures_scales and not ((trunk or paths.output) / SETTINGS).exists():
            ranks.announce("measuring activations")
            scales |= teacher.measured_scales(first, quant)
    with ranks.doing("loading the student"):
        student = engines.student_engine(
            str(inputs.start.directory),
            quant,
            student_json,
            config.lr_factor,
            config.gradient_checkpointing,
            steps,
            scales,
            config.train,
            inputs.grids,
            room_for_codes=planned.kept_codes,
        )
    if cli.is_first_rank():
        with writing(paths.output):
            save_tensor_scales(scales, paths.output)
        places = {"model": paths.model, "data": str(paths.data)}
        places |= {"student": str(inputs.start.directory)} if inputs.is_rotated else {}
        run.record_settings(paths.output, settings, student_json, places)
    stop = StopSignal()  # before this, a signal ends the process at once: there is nothing to save
    complete = train(student, targets, inputs.data, config, paths.output, stop, inputs.texts, paths.continue_from)
    if cli.is_first_rank():
        print(memory.beside_plan(planned.needs), flush=True)
    if complete:
        engines.save_student(student, final, quant, companions)
        engines.empty(on_nvme)
    stopped = f"stopped by a signal and saved: the same command resumes {paths.output}"
    cli.say(f"{final}: the trained student, {quant}" if complete else stopped)
    return 0 if complete else RESUMABLE_EXIT


def read_inputs(paths: Paths, held_out: HeldOut, quant: QuantConfig, config: TrainConfig) -> tuple[Inputs, TrainConfig]:
    """Return what the run reads, and its settings with the number of steps; raise UserError for what does not fit."""
    model = models.resolve_full_precision(paths.model)
    tokenizer = models.load_tokenizer(model)
    data = TrainingData(paths.data, tokenizer, config.seed)
    config = dataclasses.replace(config, steps=config.steps or len(data) // config.batch_size)
    if config.steps == 0:
        raise UserError(
            f"{paths.data} has {len(data)} sequences, fewer than batch_size={config.batch_size}: generate more."
        )
    run.check_schedule(config)
    texts = held_out.read(tokenizer, data)
    config_of_model = read_config(model)
    models.check_sequences(config_of_model, data.longest, data.largest, "data")
    for name, text in texts.items():
        longest, largest = max(ids.shape[1] for ids in text), int(torch.cat(text, 1).max())
        models.check_sequences(config_of_model, longest, largest, name)
    starting_point.check_teacher(paths.teacher_cache, quant, config)
    begin = starting_point.directory_of(paths.student, model, quant) if paths.student else model
    start = ModelFolder.read(Path(begin))
    prepared = prepare(start.skeleton(), quant)  # raises UserError for settings that do not fit the model
    is_rotated = rotation_of(start.config) != rotation_of(config_of_model)
    if is_rotated:
        starting_point.check_rotated(begin, quant, config)
    if config.trained.scales:
        check_scales_can_learn(prepared)
    grids = starting_point.grids_of(paths.student, quant, config) if paths.student else {}
    cache = None
    if paths.teacher_cache:
        cache = TeacherCache(paths.teacher_cache, config.loss)
        cache.check({"teacher": models.weights_fingerprint(model), "data": data.fingerprint})
        cache.check_complete(len(data), cli.rank(), cli.ranks())
        cache.check_loss()
    return Inputs(model, start, prepared, is_rotated, grids, data, texts, cache), config


def read_deepspeed(paths: Paths, config: TrainConfig, inputs: Inputs) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the DeepSpeed JSONs of the student and of a sharded teacher, with the run's settings."""
    settings = config.ds_settings(cli.ranks())
    student = deepspeed_json.resolve(paths.deepspeed, settings)
    teacher = deepspeed_json.resolve(paths.teacher_deepspeed or paths.deepspeed, settings)
    if not config.trained.weights:
        check_codes_last(inputs.prepared, deepspeed_json.dtype(student))
    student.setdefault("tensorboard", {"enabled": True, "output_path": str(paths.output), "job_name": TENSORBOARD})
    if deepspeed_json.nvme_folders(student):
        from qat.train.deepspeed_internals import nvme_is_available

        if not nvme_is_available():
            raise UserError(
                f"{paths.deepspeed} offloads to NVMe, and DeepSpeed compiles what it needs for that with the CUDA "
                "toolkit: install nvcc, set CUDA_HOME, or choose ds_configs/zero3_offload.json."
            )
    student, teacher = (deepspeed_json.with_own_folders(each, paths.output) for each in (student, teacher))
    return student, teacher


def settings_of(
    paths: Paths, quant: QuantConfig, config: TrainConfig, inputs: Inputs, student_json: dict[str, Any]
) -> tuple[dict[str, Any], Path | None]:
    """Return all that determines the run's numbers, to be recorded; and the folder of the run that it branches from."""
    settings = {
        **quant.record(),
        **asdict(config),
        "model": models.weights_fingerprint(inputs.model),
        "student": models.weights_fingerprint(str(inputs.start.directory)),
        "data": inputs.data.fingerprint,
        "teacher_cache": inputs.cache.fingerprint() if inputs.cache else None,
        "optimizer": student_json["optimizer"],
        "bf16": student_json.get("bf16"),
        "arithmetic": linear.arithmetic_of(quant),
    }
    if not paths.continue_from:
        return settings, None
    if begun := run.continued_before(paths.continue_from, paths.output):
        return settings | {"continues": begun}, None
    continues = run.check_continues(paths.continue_from, settings, student_json)
    return settings | {"continues": continues}, run.of(paths.continue_from)


def runs_teacher(config: TrainConfig, inputs: Inputs) -> bool:
    return inputs.cache is None and LOSSES[config.loss].needs_teacher


def scales_of_run(output: Path, model: Path, quant: QuantConfig) -> dict[str, float]:
    """Return the scales of tensors that a run has fixed, or, if it is new, those that the first weights give."""
    if (output / SETTINGS).exists():
        return student_folder.scales_of(output, model, quant)
    return student_folder.weight_scales(model, quant)


def plan_with_others(
    paths: Paths,
    quant: QuantConfig,
    config: TrainConfig,
    inputs: Inputs,
    student_json: dict[str, Any],
    teacher_json: dict[str, Any],
) -> Plan:
    """Plan this run in the least memory that a rank has, so that all ranks follow one plan; warn if it is short."""
    from qat.train import engines

    taught = runs_teacher(config, inputs)
    # No plan counts what a loss with records keeps.
    room = 0.0 if LOSSES[config.loss].needs_records else engines.least(memory.of_rank())
    for_whole = room if taught and not paths.teacher_deepspeed else 0.0
    model, longest = read_config(inputs.model), inputs.data.longest
    given = (model, student_json, teacher_json if taught else None, longest, config, quant)
    planned = plan_of(*given, room, for_whole)
    if cli.is_first_rank():
        warn_if_short(planned)
    return planned


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


if __name__ == "__main__":
    cli.run(main)
