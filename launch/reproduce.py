"""The paper's tables and those beyond it, one cell after another, with the real commands.

python launch/reproduce.py measures all missing cells; select with --tables and --cells, limit the time with --minutes.
Stop it at any moment, kill it, start it again: it resumes, and a cell whose JSON is there, with the same settings, is
not computed again.

A table is a recipe in launch/recipes/reproduce/. What a cell measured is <output>/cells/<name>.json; the cells of a
table are collected in <output>/<table>.json.
"""

import dataclasses
import fnmatch
import itertools
import json
import random
import shutil
import sys
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml

from datagen.sampling import STRATEGIES
from launch import cli
from launch.paper import claims, curve, plots, served
from launch.stages import CPU_ONLY, Stages, free_port, interrupt
from qat.evaluate import heldout, llama_cpp, llama_quantize
from qat.ptq import METHODS
from qat.quant.config import QuantConfig
from qat.runtime.errors import UserError, check_least, check_one_of, differences
from qat.runtime.files import lock, read_json, read_lines, wait_until_free, write_atomically, writing
from qat.runtime.preemption import RESUMABLE_EXIT, handle_signals
from qat.runtime.settings import LATER, recorded
from qat.store import models, rotate, smollm2
from qat.store.run_folder import CHECKPOINTS, FINAL, LOG
from qat.train import checkpoint
from qat.train.config import TrainConfig
from qat.train.deepspeed_json import SHIPPED
from qat.train.rotations import LearnConfig

TABLES = (
    "main",
    "recipes",
    "kv",
    "distillation",
    "quantizers",
    "data",
    "floats",
    "served",
    "rotations",
    "budget",
    "low_bits",
    "chat",
)

_LAUNCH = Path(__file__).parent
_RECIPES = _LAUNCH / "recipes" / "reproduce"
_RTN = "rtn"
_LLAMA_CPPS = {f"llama_{kind}": kind for kind in llama_quantize.KINDS}
PEERS = "peers.json"
"""The results of benchmarks/peers.py, in the folder of the results."""

TEXTS, TASKS, WHOLE_TASKS, SERVED = "texts", "tasks", "tasks-whole", "served"
"""The kinds of measurement: on texts; on the first documents of tasks; on all of them; in llama.cpp."""

_CALIBRATION = 64
"""Number of sequences that the post-training methods calibrate on."""

_ROTATIONS = ("none", *rotate.KINDS, "learned")
_LEARNING = LearnConfig(batch_size=2)
"""How rotations are learned; the tokens are those of the usual training."""

_START = "start"
"""Name, in a cell's folder, of the student's starting weights, if they are not the model's."""


@dataclass(frozen=True)
class Reproduction:
    """The tables to reproduce, and where.

    Args:
        model: a Hugging Face directory or hub name
        tables: tables, comma-separated: main, recipes, kv, distillation, quantizers, data, floats, served,
            rotations, budget, low_bits, chat
        cells: only cells whose name matches one of these patterns, comma-separated, say qat_4-8-4*; the suffix .tasks
            selects a cell's accuracy (qat_4-8-4.tasks), .served its measurement in llama.cpp
        minutes: stop cleanly after this many; 0 for no limit
        output: folder of the results
        work: folder of everything else: training data, runs
        ranks: number of training ranks; it must divide the 2 sequences of a step. 0 for one per GPU, or 2 on a CPU
        keep_models: keep the trained models
    """

    model: str = smollm2.EMBEDDED
    tables: str = ",".join(TABLES)
    cells: str = "*"
    minutes: float = 0
    output: Path = Path("docs/results")
    work: Path = Path("runs/reproduce")
    ranks: int = 0
    keep_models: bool = False

    def __post_init__(self) -> None:
        if unknown := set(self.tables.split(",")) - set(TABLES):
            raise UserError(f"tables={min(unknown)!r} is invalid: choose {', '.join(TABLES)}, with commas between.")
        if self.ranks not in (0, 1, 2):
            raise UserError(f"ranks={self.ranks} is invalid: choose 1 or 2, or 0 to choose by the machine.")
        check_least(self, minutes=0)


@dataclass(frozen=True)
class Budget:
    """The budget of every QAT cell of a table, and the text that every cell is measured on.

    Args:
        steps: optimizer steps of 2 sequences
        max_length: longest training sequence, in tokens
        lr: peak learning rate
        warmup_steps: steps of linear warm-up
        decay_steps: number of last steps over which the learning rate decays; cells that differ only in their number of
            steps share the constant-rate steps before. 0: decay over all steps
        sequences: number of generated sequences; 0 for as many as the steps take. Cells that share steps must agree
        text: value of launch/evaluate.py's --text
        window: tokens per window
        windows: windows per text
    """

    steps: int = 100
    max_length: int = 256
    lr: float = 2e-4
    warmup_steps: int = 4
    decay_steps: int = field(default=0, metadata=LATER)
    sequences: int = field(default=0, metadata=LATER)
    text: str = "encyclopedia,howto"
    window: int = 512
    windows: int = 16


@dataclass(frozen=True)
class Cell:
    """One cell of a table: a method and its settings.

    Args:
        method: full_precision, qat, a method of launch/quantize.py, or llama_ with one of llama.cpp's own, which are
            only served
        quant: the quantization
        budget: the budget of training and measurement
        data: training or calibration data: top1, sample, hybrid or chat (written by the teacher), or a text
        chat_share: with data=chat, the share of the sequences that are dialogues; the rest are hybrid
        rotation: rotation of the weights, and in front of the MLP's last layer, before anything else
        train: value of launch/train.py's --train
        loss: value of launch/train.py's --loss
        student: the student's initial weights: model, or the post-training method that makes them
        seed: seed for the data and its order
    """

    method: str
    quant: QuantConfig
    budget: Budget
    data: str = "hybrid"
    loss: str = "logits"
    student: str = "model"
    seed: int = 0
    chat_share: float = field(default=1.0, metadata=LATER)
    rotation: str = field(default="none", metadata=LATER)
    train: str = field(default="weights", metadata=LATER)

    def __post_init__(self) -> None:
        methods = ("full_precision", *METHODS, "qat", *_LLAMA_CPPS)
        students = ("model", *(name for name in METHODS if name != _RTN))
        check_one_of(self, method=methods, student=students, rotation=_ROTATIONS)

    @property
    def changes(self) -> list[str]:
        """Return all settings that differ from the usual ones, some of which are recorded only then."""
        usual = Cell(self.method, dataclasses.replace(QuantConfig(), **_bits(str(self.quant))), Budget())
        own, others = _flat(self), _flat(usual)
        changed = {key: value for key, value in own.items() if value != others.get(key)}
        for pattern, settings in changed.pop("overrides", {}).items():
            changed |= {f"{pattern}.{key}": value for key, value in settings.items()}
        return [f"{key}={value}" for key, value in changed.items()]

    @property
    def name(self) -> str:
        name = "_".join([self.method, str(self.quant), *self.changes])
        return name.replace("/", "+").replace(",", "+")  # it names files, and --cells has commas between


@dataclass(frozen=True)
class Tasks:
    """The tasks that a cell is measured on in addition to texts.

    Args:
        tasks: as launch/evaluate.py takes it; "" for none
        limit: documents of each; 0 for all
    """

    tasks: str = ""
    limit: int = 200


@dataclass(frozen=True)
class Served:
    """The KV caches with which a cell is measured in llama.cpp, in place of its simulation.

    Args:
        caches: as launch/evaluate.py takes it; "" for none
    """

    caches: str = ""


class Job(NamedTuple):
    """A measurement of a cell: its perplexity and KL, also as it is ``served``, or, with ``tasks``, its accuracy; and
    its priority: the lowest number comes first."""

    priority: int
    cell: Cell
    tasks: Tasks | None = None
    served: Served | None = None

    @property
    def kind(self) -> str:
        """Return what is measured, and with how many documents."""
        if self.tasks is None:
            return SERVED if self.served else TEXTS
        return TASKS if self.tasks.limit else WHOLE_TASKS

    @property
    def name(self) -> str:
        return self.cell.name if self.kind == TEXTS else f"{self.cell.name}.{self.kind}"

    @property
    def settings(self) -> dict[str, Any]:
        """Return what its JSON records, but for the model."""
        more = self.tasks or self.served
        return {**_flat(self.cell), **(recorded(more) if more else {})}


def main() -> int:
    (reproduction,) = cli.parse(__doc__, Reproduction)
    handle_signals(interrupt)
    tables = {table: read_recipe(_RECIPES / f"{table}.yaml") for table in TABLES}
    chosen = {table: tables[table] for table in reproduction.tables.split(",")}
    wanted = queue(chosen, reproduction.cells)
    if not wanted:
        raise UserError(
            f"cells={reproduction.cells} matches no cell of {reproduction.tables}: give a pattern that does, say "
            f"{next(iter(chosen.values()))[0].name}."
        )
    lock(reproduction.work)
    deadline = time.monotonic() + 60 * reproduction.minutes if reproduction.minutes else None
    runner = _Runner(reproduction, deadline)
    jobs = [job for job in wanted if not runner.is_done(job)]
    if any(job.served for job in jobs):
        llama_cpp.library()  # raises UserError now, not after hours of training
    failures = []
    try:
        for number, job in enumerate(jobs, 1):
            print(f"\n===== job {number} of {len(jobs)}: {job.name} =====", flush=True)
            try:
                runner.run(job, keep_model=any(later.cell == job.cell for later in jobs[number:]))
            except UserError as error:  # a cell that cannot be made must not stop the others
                print(error, flush=True)
                failures.append(job.name)
            runner.collect(tables)
    except KeyboardInterrupt:
        print("\nstopped: the same command resumes", flush=True)
        return RESUMABLE_EXIT
    finally:
        runner.collect(tables)
    if failures:
        raise UserError(f"{len(failures)} of {len(jobs)} jobs failed: {', '.join(failures)}.")
    done = (
        f"{len(jobs)} jobs done now, {len(wanted) - len(jobs)} before" if jobs else f"all {len(wanted)} jobs were done"
    )
    print(f"{reproduction.output}: {done}; README.md there has the tables", flush=True)
    return 0


def read_recipe(path: Path) -> list[Job]:
    """Return the jobs of a table, in its order. A list in a recipe stands for each of its values in turn."""
    jobs = []
    for entry in yaml.safe_load(path.read_text()):
        choices = [value if isinstance(value, list) else [value] for value in entry.values()]
        for values in itertools.product(*choices):
            jobs += _jobs(dict(zip(entry, values, strict=True)), path)
    return jobs


def _jobs(settings: dict[str, Any], path: Path) -> list[Job]:
    priority, tasks_priority = settings.pop("priority", 1), settings.pop("tasks_priority", 4)
    settings |= _bits(settings.pop("bits", "16-16-16"))

    def take(kind: type) -> dict[str, Any]:
        names = [one.name for one in fields(kind) if one.name in settings]
        return {name: settings.pop(name) for name in names}

    tasks, in_llama_cpp = Tasks(**take(Tasks)), Served(**take(Served))
    cell = Cell(quant=QuantConfig(**take(QuantConfig)), budget=Budget(**take(Budget)), **take(Cell))
    if settings:
        raise UserError(f"{path} has {min(settings)!r}, which is no setting of a cell.")
    if in_llama_cpp.caches:
        return [Job(priority, cell, served=in_llama_cpp)]
    return [Job(priority, cell), *([Job(tasks_priority, cell, tasks)] if tasks.tasks else [])]


def queue(tables: dict[str, list[Job]], patterns: str) -> list[Job]:
    """Return the chosen jobs of all tables, each once: by priority, then in the order of the tables."""
    jobs = sorted((job for jobs in tables.values() for job in jobs), key=lambda job: job.priority)
    chosen = [job for job in jobs if any(fnmatch.fnmatch(job.name, pattern) for pattern in patterns.split(","))]
    unique: dict[tuple[Any, ...], Job] = {}
    for job in chosen:
        unique.setdefault(job[1:], job)
    return list(unique.values())


class _Runner:
    def __init__(self, reproduction: Reproduction, deadline: float | None):
        self.reproduction, self.deadline = reproduction, deadline
        self.work, self.cells = reproduction.work, reproduction.output / "cells"
        self.model = models.resolve_full_precision(reproduction.model)
        self.fingerprint = models.weights_fingerprint(self.model)
        self._claim()
        gpus = torch.cuda.device_count()
        self.ranks = reproduction.ranks or min(gpus or 2, 2)
        self.environment: dict[str, str] = {} if gpus else dict(CPU_ONLY)
        self.ds_config = SHIPPED / ("zero3.json" if gpus else "zero3_cpu.json")

    def _claim(self) -> None:
        """Raise UserError if the folders hold results or work of another model."""
        with writing(self.cells):
            self.cells.mkdir(parents=True, exist_ok=True)
        models_there = {_settings_of(path).get("model") for path in self.cells.glob("*.json")}
        if models_there - {self.fingerprint, None}:
            raise UserError(f"{self.cells} holds results of another model: give another --output and --work.")
        record = self.work / "model"
        if record.exists() and record.read_text() != self.fingerprint:
            raise UserError(f"{self.work} holds the work on another model: give another --work.")
        _write(record, self.fingerprint)

    def _claim_cell(self, job: Job, folder: Path) -> None:
        """Raise UserError if the work in ``folder`` was made with other settings, which its name does not show."""
        record, settings = folder / "cell.json", self.settings(Job(0, job.cell))
        if record.exists() and (listed := differences(json.loads(record.read_text()), settings)):
            raise UserError(f"{folder} holds work of other settings ({listed}): delete it, or give another --work.")
        _write(record, json.dumps(settings, indent=1) + "\n")

    def settings(self, job: Job) -> dict[str, Any]:
        return {"model": self.fingerprint, **job.settings}

    def path(self, job: Job) -> Path:
        return self.cells / f"{job.name}.json"

    def is_done(self, job: Job) -> bool:
        return _settings_of(self.path(job)) == self.settings(job)

    def run(self, job: Job, keep_model: bool) -> None:
        """Do a job, resuming the work of an earlier start, and write its JSON."""
        cell = job.cell
        folder = self.work / "cells" / cell.name
        self._claim_cell(job, folder)
        stages = Stages(folder / "stages.json", self.environment, self.deadline)
        self._make(job, folder, stages)
        evaluation = folder / f"{job.kind}.json"
        evaluate = [sys.executable, _LAUNCH / "evaluate.py", "--output", evaluation]
        if job.served:
            evaluate += ["--engine=llama.cpp", "--cache", job.served.caches]
        if cell.method in _LLAMA_CPPS:
            evaluate += ["--method", _LLAMA_CPPS[cell.method]]
        if on_the_fly := _rounds_by_itself(job):
            evaluate += ["--method=rtn", *_flags(cell.quant)]
        has_own = (folder / FINAL).exists() and not on_the_fly
        evaluate += ["--model", folder / FINAL if has_own else self._rotated(cell, stages)]
        if job.tasks:
            evaluate += ["--text=none", "--tasks", job.tasks.tasks, "--limit", job.tasks.limit]
        else:
            budget = cell.budget
            evaluate += ["--text", budget.text, "--teacher", self.model]
            evaluate += ["--window", budget.window, "--windows", budget.windows]
        stages.run(evaluation.stem, evaluate)
        result = {
            "settings": self.settings(job),
            "name": cell.name,
            "method": cell.method,
            "bits": str(cell.quant),
            "changes": cell.changes,
            "seed": cell.seed,
            "budget": asdict(cell.budget) | {"trained": _trained(folder)},
            **{key: value for key, value in json.loads(evaluation.read_text()).items() if key != "settings"},
            "stage_seconds": {name: round(seconds, 1) for name, seconds in stages.seconds.items()},
        }
        _write(self.path(job), json.dumps(result, indent=1) + "\n")
        checkpoint.delete_all(folder / CHECKPOINTS)
        shutil.rmtree(folder / _START, ignore_errors=True)
        if not (keep_model or self.reproduction.keep_models):
            shutil.rmtree(folder / FINAL, ignore_errors=True)

    def _make(self, job: Job, folder: Path, stages: Stages) -> None:
        """Make the cell's model, if it has one of its own that does not exist yet."""
        cell = job.cell
        if (folder / FINAL).exists():
            return
        if cell.method == "qat":
            self._train(cell, folder, stages)
        elif cell.method in METHODS and not _rounds_by_itself(job):
            self._quantize(cell, cell.method, folder / FINAL, stages)

    def _quantize(self, cell: Cell, method: str, output: Path, stages: Stages) -> None:
        quantize = [sys.executable, _LAUNCH / "quantize.py", "--method", method, *_flags(cell.quant)]
        if METHODS[method].needs_text or cell.quant.measures_scales:
            quantize += ["--data", self._data(cell, _CALIBRATION, stages), "--sequences", _CALIBRATION]
        stages.run("quantize", quantize, ["--model", self._rotated(cell, stages), "--output", output])

    def _train(self, cell: Cell, folder: Path, stages: Stages) -> None:
        budget = cell.budget
        config = TrainConfig(
            loss=cell.loss,
            train=cell.train,
            steps=budget.steps,
            lr=budget.lr,
            warmup_steps=budget.warmup_steps,
            decay_steps=budget.decay_steps,
            batch_size=2,
            gradient_checkpointing=False,
            save_every=25,
            keep=1,
            seed=cell.seed,
        )
        begin: list[object] = []
        if cell.student in METHODS:
            begin = ["--student", folder / _START]
            self._quantize(cell, cell.student, folder / _START, stages)
        elif cell.rotation != "none":
            begin = ["--student", self._rotated(cell, stages)]
        if budget.decay_steps:
            begin += ["--continue_from", self._trunk(cell, config, begin, stages)]
        self._learn(cell, config, folder, begin, stages)

    def _learn(self, cell: Cell, config: TrainConfig, folder: Path, begin: list[object], stages: Stages) -> None:
        data = self._data(cell, cell.budget.sequences or 2 * cell.budget.steps, stages)
        wait_until_free(folder)  # a killed reproduction leaves its training running, which saves and ends by itself
        stages.run(
            "train",
            [Path(sys.executable).parent / "deepspeed", f"--num_gpus={self.ranks}", f"--master_port={free_port()}"],
            [_LAUNCH / "train.py", f"--deepspeed={self.ds_config}", *_flags(cell.quant), *_flags(config)],
            ["--model", self.model, "--data", data, "--output", folder, *begin],
        )

    def _trunk(self, cell: Cell, config: TrainConfig, begin: list[object], stages: Stages) -> Path:
        """Return the checkpoint from which the learning rate of the cell's training falls: of a run at constant rate,
        which continues from the longest shorter one that there is."""
        shared = dataclasses.replace(cell.budget, steps=Budget.steps, decay_steps=0)
        trunk = self.work / "trunks" / dataclasses.replace(cell, budget=shared).name
        steps = config.steps - config.decay_steps
        run = trunk / str(steps)
        found = checkpoint.at(run / CHECKPOINTS, steps)
        if (run / FINAL).exists() and found.exists():
            return found
        record = run / "continues"  # what a stopped run began with
        if not record.exists():
            runs = sorted((path for path in trunk.glob("[0-9]*") if int(path.name) < steps), key=lambda p: int(p.name))
            longest = [checkpoint.at(path / CHECKPOINTS, int(path.name)) for path in runs if (path / FINAL).exists()]
            _write(record, str(longest[-1]) if longest else "")
        before = record.read_text()
        config = dataclasses.replace(config, steps=steps, decay_steps=0, min_lr_ratio=1.0)
        self._learn(cell, config, run, [*begin, *(["--continue_from", before] if before else [])], stages)
        return found

    def _rotated(self, cell: Cell, stages: Stages) -> Path | str:
        """Return the full-precision model that the cell quantizes; rotate it first if that is asked for."""
        if cell.rotation == "none":
            return self.model
        # The matrices are those of its name: drawn ones depend on the seed alone, learned ones on what is quantized.
        usual = Cell("rtn", cell.quant, Budget(), rotation=cell.rotation, seed=cell.seed)
        folder = self.work / "rotated" / (usual.name if cell.rotation == "learned" else f"{cell.rotation}-{cell.seed}")
        if folder.exists():
            return folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        settings: list[object] = ["--seed", cell.seed]
        if cell.rotation == "learned":
            data = self._data(usual, 2 * Budget.steps, stages)
            settings += ["--data", data, *_flags(_LEARNING), *_flags(cell.quant)]
        else:
            settings += ["--kind", cell.rotation]
        settings += ["--down=blocks"]  # the R4 that vLLM serves too
        command = [sys.executable, _LAUNCH / "rotate.py", "--model", self.model, "--output", folder]
        stages.run("rotate", command, settings)
        return folder

    def _data(self, cell: Cell, sequences: int, stages: Stages) -> Path:
        """Return the folder of the cell's training sequences; make it if it does not exist."""
        budget = cell.budget
        share = [f"--chat_share={cell.chat_share}"] if cell.data == "chat" else []
        name = f"chat{cell.chat_share}" if share else cell.data
        folder = self.work / "data" / f"{name}-{sequences}x{budget.max_length}-seed{cell.seed}"
        if cell.data in STRATEGIES:
            source = ["--strategy", cell.data, "--seed", cell.seed, "--batch_size=50", *share]
        else:
            source = ["--corpus", self._corpus(cell)]
        sizes = ["--sequences", sequences, "--max_length", budget.max_length, "--sequences_per_shard=50"]
        generate = [sys.executable, _LAUNCH / "generate.py", "--model", self.model, "--output", folder]
        stages.run("generate", generate, sizes, source)
        return folder

    def _corpus(self, cell: Cell) -> Path:
        """Return a file with the documents of a text, shuffled with the cell's seed."""
        path = self.work / "texts" / f"{cell.data}-seed{cell.seed}.jsonl"
        if not path.exists():
            documents = list(heldout.paragraphs(cell.data))
            random.Random(cell.seed).shuffle(documents)
            _write(path, "".join(json.dumps({"text": document}) + "\n" for document in documents))
        return path

    def collect(self, tables: dict[str, list[Job]]) -> None:
        """Write the results so far: each table as JSON, and all of them as a page with plots."""
        done = {(job.cell.name, job.kind): job for jobs in tables.values() for job in jobs if self.is_done(job)}
        results = Results.of(tables, {key: json.loads(self.path(job).read_text()) for key, job in done.items()})
        output, cells = self.reproduction.output, results.cells
        with writing(output):
            write_atomically(output / "served.json", json.dumps(served.rows(results.served), indent=1) + "\n")
            if results.served:
                plots.plot_served(results.served, output / "served.png")
            for table, listed in results.tables.items():
                rows = [_row(cells[name], results.accuracies.get(name)) for name in listed if name in cells]
                write_atomically(output / f"{table}.json", json.dumps(rows, indent=1) + "\n")
                if rows:
                    plots.plot_cells([cells[name] for name in listed if name in cells], output / f"{table}.png")
            if curves := curve.curves(cells):
                plots.plot_curves(curves, output / "curve.png")
            averages = claims.zero_shot_averages(results.accuracies)
            plots.plot_bits([*cells.values()], averages, claims.SETTINGS, output / "bits.png")
            write_atomically(output / "README.md", results.page(output / PEERS))


@dataclass(frozen=True)
class Results:
    """What was measured of some tables.

    Args:
        tables: the names of each table's cells, in order, but for what is served
        cells: each cell's results on texts, by name
        accuracies: each cell's results on tasks, by name
        whole: the same on all documents
        served: the results in llama.cpp, in order
        to_serve: the number of cells to measure there
    """

    tables: dict[str, list[str]]
    cells: dict[str, Any]
    accuracies: dict[str, Any]
    whole: dict[str, Any]
    served: list[Any]
    to_serve: int

    @classmethod
    def of(cls, tables: dict[str, list[Job]], found: dict[tuple[str, str], Any]) -> "Results":
        """Return the results in ``tables`` of what was ``found``, by a cell's name and the kind of measurement."""
        cells, accuracies, whole, in_llama_cpp = (
            {name: found[name, kind] for name, kind in found if kind == of}
            for of in (TEXTS, TASKS, WHOLE_TASKS, SERVED)
        )
        names = {table: list(dict.fromkeys(job.cell.name for job in jobs)) for table, jobs in tables.items()}
        to_serve = names.pop("served", [])
        shown = [in_llama_cpp[name] for name in to_serve if name in in_llama_cpp]
        return cls(names, cells, accuracies, whole, shown, len(to_serve))

    def page(self, peers: Path) -> str:
        """Return the page of results, in Markdown, with those of benchmarks/peers.py, if the file is there."""
        of_peers = read_json(peers) if peers.exists() else {}
        in_llama_cpp = served.markdown(self.served, self.to_serve)
        return claims.markdown(self.tables, self.cells, self.accuracies, self.whole, of_peers, in_llama_cpp)


def _write(path: Path, content: str) -> None:
    """Write a file, and make its folder; raise UserError where that is impossible."""
    with writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)


def _rounds_by_itself(job: Job) -> bool:
    """Return whether launch/evaluate.py makes a cell's model: it rounds to nearest where nothing is to be measured, but
    not for an engine."""
    return job.cell.method == _RTN and not job.served and not job.cell.quant.measures_scales


def _settings_of(path: Path) -> dict[str, Any]:
    """Return the settings that a cell's JSON was measured with; empty for a file that is not a result, or damaged."""
    try:
        settings = json.loads(path.read_text())["settings"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return settings if isinstance(settings, dict) else {}


def _trained(folder: Path) -> dict[str, Any]:
    """Return the cost of a training run and, if a teacher was used, its KL at every step; empty if there was no
    training."""
    if not (folder / LOG).is_file():
        return {}
    log = read_lines(folder / LOG)
    taken = {"tokens": log[-1]["tokens"], "seconds": log[-1]["seconds"]}
    return taken | ({"kl": [round(line["kl"], 5) for line in log]} if "kl" in log[-1] else {})


def _row(cell: dict[str, Any], accuracy: dict[str, Any] | None) -> dict[str, Any]:
    """Return a cell as it appears in a table: without what was measured per window, per document or per step."""
    row = {key: cell[key] for key in ("name", "method", "bits", "seed", "settings", "budget", "machine", "versions")}
    row["budget"] = row["budget"] | {"trained": {k: v for k, v in row["budget"]["trained"].items() if k != "kl"}}
    for measure in ("perplexity", "nll", "nll_stderr", "kl", "kl_stderr", "kl_p99", "top1", "top1_stderr"):
        if values := {text: score[measure] for text, score in cell["texts"].items() if measure in score}:
            row[measure] = values  # earlier versions lack some
    if accuracy:
        for measure in ("metric", "accuracy", "stderr", "documents"):
            row[f"task_{measure}"] = {task: score[measure] for task, score in accuracy["tasks"].items()}
    return row


def _flat(cell: Cell) -> dict[str, Any]:
    own = recorded(cell) | {"quant": cell.quant.record(), "budget": recorded(cell.budget)}
    return {"method": own.pop("method"), **own.pop("quant"), **own.pop("budget"), **own}


def _bits(short: str) -> dict[str, Any]:
    """Parse the field's short form, W-A-KV, into the three bit-widths."""
    return dict(zip(("w_bits", "a_bits", "kv_bits"), map(int, short.split("-")), strict=True))


def _flags(config: Any) -> list[str]:
    settings = config.record() if isinstance(config, QuantConfig) else asdict(config)
    return [f"--{key}={value}" for key, value in settings.items()]


if __name__ == "__main__":
    cli.run(main)
