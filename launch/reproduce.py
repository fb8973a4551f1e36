"""The paper's tables, one cell after another, with the real commands.

python launch/reproduce.py runs all that is missing; --tables and --cells choose, --minutes limits. Stop it at any
moment, kill it, start it again: it goes on from where it was, and a cell whose JSON is there is never computed again.

A table is a recipe in launch/recipes/reproduce/. What a cell measured is <output>/cells/<name>.json; the cells of a
table are collected in <output>/<table>.json.
"""

import dataclasses
import fnmatch
import importlib.metadata
import itertools
import json
import shutil
import signal
import sys
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import yaml

from launch import cli
from launch.stages import CPU_ONLY, Stages, free_port, interrupt
from qat import models
from qat.errors import UserError
from qat.files import lock, wait_until_free, write_atomically
from qat.machine import machine
from qat.preemption import RESUMABLE_EXIT
from qat.prepare import QuantConfig
from qat.training import FINAL, LOG, TrainConfig

TABLES = ("main", "recipes", "kv", "distillation", "quantizers", "data")

_LAUNCH = Path(__file__).parent
_ROOT = _LAUNCH.parent
_RECIPES = _LAUNCH / "recipes" / "reproduce"
_PTQ = ("gptq", "smoothquant")
_METHODS = ("full_precision", "rtn", *_PTQ, "qat")
_CALIBRATION = 64
"""Sequences that the post-training methods look at."""


@dataclass(frozen=True)
class Reproduction:
    """What to reproduce, on what.

    Args:
        model: a Hugging Face directory or hub name
        tables: tables, with commas between: main, recipes, kv, distillation, quantizers, data
        cells: only cells whose name matches one of these patterns, with commas between, say qat_4-8-4*
        minutes: stop cleanly after so many; 0 for no limit
        output: folder of the results
        work: folder of everything else: training data, runs
        ranks: how many train; their sequences are shared out, so it must divide 2. 0 for one per GPU, or 2 on a CPU
        keep_models: keep the trained models
    """

    model: str = models.EMBEDDED
    tables: str = ",".join(TABLES)
    cells: str = "*"
    minutes: float = 0
    output: Path = Path("docs/results")
    work: Path = Path("runs/reproduce")
    ranks: int = 0
    keep_models: bool = False

    def __post_init__(self) -> None:
        if unknown := set(self.tables.split(",")) - set(TABLES):
            raise UserError(f"tables={min(unknown)!r} is not possible: give {', '.join(TABLES)}, with commas between.")
        if self.ranks not in (0, 1, 2):
            raise UserError(f"ranks={self.ranks} is not possible: give 1 or 2, or 0 to choose by the machine.")
        if self.minutes < 0:
            raise UserError(f"minutes={self.minutes} is not possible: give 0 or more.")


@dataclass(frozen=True)
class Budget:
    """What every QAT cell of a table may use, and what every cell is measured on.

    Args:
        steps: optimizer steps of 2 sequences
        max_length: longest training sequence, in tokens
        lr: peak learning rate
        warmup_steps: its linear warm-up
        text: as launch/evaluate.py takes it
        window: tokens of a window
        windows: of each text
    """

    steps: int = 100
    max_length: int = 256
    lr: float = 2e-4
    warmup_steps: int = 4
    text: str = "encyclopedia,howto"
    window: int = 512
    windows: int = 16


@dataclass(frozen=True)
class Cell:
    """One cell of a table: a method, and what it is given.

    Args:
        method: full_precision, rtn, gptq, smoothquant or qat
        quant: what is quantized, and how
        budget: of the training and of the measurement
        data: what is trained or calibrated on: top1, sample or hybrid (written by the teacher), or a text
        loss: as launch/train.py takes it
        seed: of the data and of its order
    """

    method: str
    quant: QuantConfig
    budget: Budget
    data: str = "hybrid"
    loss: str = "logits"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in _METHODS:
            raise UserError(f"method={self.method!r} is not possible: give {', '.join(_METHODS)}.")

    @property
    def name(self) -> str:
        """Says all that is not as usual."""
        usual = Cell(self.method, dataclasses.replace(QuantConfig(), **_bits(str(self.quant))), Budget())
        own, others = _flat(self), _flat(usual)
        changes = [f"{key}={own[key]}" for key in own if own[key] != others[key]]
        return "_".join([self.method, str(self.quant), *changes]).replace("/", "-")


def main() -> int:
    (reproduction,) = cli.parse(__doc__, Reproduction)
    signal.signal(signal.SIGTERM, interrupt)
    lock(reproduction.work)
    deadline = time.monotonic() + 60 * reproduction.minutes if reproduction.minutes else None
    tables = {table: read_recipe(_RECIPES / f"{table}.yaml") for table in reproduction.tables.split(",")}
    queue = _queue(tables, reproduction.cells)
    runner = _Runner(reproduction, deadline)
    failures = []
    try:
        for number, cell in enumerate(queue, 1):
            if runner.is_done(cell):
                continue
            print(f"\n===== cell {number} of {len(queue)}: {cell.name} =====", flush=True)
            try:
                runner.run(cell)
            except UserError as error:  # one cell that cannot be must not stop the others
                print(error, flush=True)
                failures.append(cell.name)
            runner.collect(tables)
    except KeyboardInterrupt:
        print("\nstopped: the same command goes on from here", flush=True)
        return RESUMABLE_EXIT
    finally:
        runner.collect(tables)
    if failures:
        raise UserError(f"{len(failures)} of {len(queue)} cells failed: {', '.join(failures)}.")
    return 0


def read_recipe(path: Path) -> list[tuple[int, Cell]]:
    """The (priority, cell) of a table, in its order. A list in a recipe stands for each of its values in turn."""
    cells = []
    for entry in yaml.safe_load(path.read_text()):
        choices = [value if isinstance(value, list) else [value] for value in entry.values()]
        for values in itertools.product(*choices):
            cells.append(_cell(dict(zip(entry, values, strict=True)), path))
    return cells


def _cell(settings: dict[str, Any], path: Path) -> tuple[int, Cell]:
    priority = settings.pop("priority", 1)
    settings |= _bits(settings.pop("bits", "16-16-16"))

    def take(kind: type) -> dict[str, Any]:
        names = [field.name for field in fields(kind) if field.name in settings]
        return {name: settings.pop(name) for name in names}

    quant, budget, rest = QuantConfig(**take(QuantConfig)), Budget(**take(Budget)), take(Cell)
    if settings:
        raise UserError(f"{path} has {min(settings)!r}, which is no setting of a cell.")
    return priority, Cell(quant=quant, budget=budget, **rest)


def _queue(tables: dict[str, list[tuple[int, Cell]]], patterns: str) -> list[Cell]:
    """The chosen cells of all tables, each once: by priority, then in the order of the tables."""
    entries = sorted((entry for cells in tables.values() for entry in cells), key=lambda entry: entry[0])
    chosen = {cell.name: cell for _, cell in entries if any(fnmatch.fnmatch(cell.name, p) for p in patterns.split(","))}
    return list(chosen.values())


class _Runner:
    def __init__(self, reproduction: Reproduction, deadline: float | None):
        self.reproduction, self.deadline = reproduction, deadline
        self.work, self.cells = reproduction.work, reproduction.output / "cells"
        self.cells.mkdir(parents=True, exist_ok=True)
        self.model = models.resolve_full_precision(reproduction.model)
        self.fingerprint = models.weights_fingerprint(self.model)
        gpus = torch.cuda.device_count()
        self.ranks = reproduction.ranks or min(gpus or 2, 2)
        self.environment: dict[str, str] = {} if gpus else dict(CPU_ONLY)
        self.ds_config = _ROOT / "ds_configs" / ("zero3.json" if gpus else "zero3_cpu.json")
        self.stages = Stages(self.work / "stages.json", self.environment, deadline)

    def result(self, cell: Cell) -> Path:
        return self.cells / f"{cell.name}.json"

    def settings(self, cell: Cell) -> dict[str, Any]:
        return {"model": self.fingerprint, **_flat(cell)}

    def is_done(self, cell: Cell) -> bool:
        path = self.result(cell)
        return path.is_file() and json.loads(path.read_text())["settings"] == self.settings(cell)

    def run(self, cell: Cell) -> None:
        """Compute a cell, from where an earlier start left it, and write its JSON."""
        folder = self.work / "cells" / cell.name
        folder.mkdir(parents=True, exist_ok=True)
        self.stages = Stages(folder / "stages.json", self.environment, self.deadline)
        budget = cell.budget
        evaluate = [
            *(sys.executable, _LAUNCH / "evaluate.py", "--text", budget.text, "--teacher", self.model),
            *(f"--window={budget.window}", f"--windows={budget.windows}", "--output", folder / "evaluation.json"),
        ]
        trained: dict[str, Any] = {}
        if cell.method in ("full_precision", "rtn"):
            rtn = ["--method=rtn", *_flags(cell.quant)] if cell.method == "rtn" else []
            self.stages.run("evaluate", evaluate, ["--model", self.model, *rtn])
        elif cell.method in _PTQ:
            quantized = folder / FINAL
            if not quantized.exists():
                quantize = [sys.executable, _LAUNCH / "quantize.py", "--method", cell.method, *_flags(cell.quant)]
                places = ["--model", self.model, "--data", self._data(cell, _CALIBRATION), "--output", quantized]
                self.stages.run("quantize", quantize, places)
            self.stages.run("evaluate", evaluate, ["--model", quantized])
        else:
            self._train(cell, folder)
            self.stages.run("evaluate", evaluate, ["--model", folder / FINAL])
            log = [json.loads(line) for line in (folder / LOG).read_text().splitlines()]
            trained = {"tokens": log[-1]["tokens"], "seconds": log[-1]["seconds"], "kl": [line["kl"] for line in log]}
        evaluation = json.loads((folder / "evaluation.json").read_text())
        packages = ("torch", "deepspeed", "transformers")
        result = {
            "settings": self.settings(cell),
            "name": cell.name,
            "method": cell.method,
            "bits": str(cell.quant),
            "seed": cell.seed,
            "budget": asdict(budget) | {"trained": trained},
            "texts": evaluation["texts"],
            "stage_seconds": {name: round(seconds, 1) for name, seconds in self.stages.seconds.items()},
            "machine": machine(),
            "versions": {package: importlib.metadata.version(package) for package in packages},
        }
        write_atomically(self.result(cell), json.dumps(result, indent=1) + "\n")
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        if not self.reproduction.keep_models:
            shutil.rmtree(folder / FINAL, ignore_errors=True)

    def _train(self, cell: Cell, folder: Path) -> None:
        data = self._data(cell, 2 * cell.budget.steps)
        budget = cell.budget
        config = TrainConfig(
            loss=cell.loss,
            steps=budget.steps,
            lr=budget.lr,
            warmup_steps=budget.warmup_steps,
            gradient_accumulation_steps=2 // self.ranks,
            gradient_checkpointing=False,
            save_every=25,
            keep=1,
            seed=cell.seed,
        )
        wait_until_free(folder)  # a reproduction that was killed outright leaves its training behind, which ends well
        self.stages.run(
            "train",
            [Path(sys.executable).parent / "deepspeed", f"--num_gpus={self.ranks}", f"--master_port={free_port()}"],
            [_LAUNCH / "train.py", f"--deepspeed={self.ds_config}", *_flags(cell.quant), *_flags(config)],
            ["--model", self.model, "--data", data, "--output", folder],
        )

    def _data(self, cell: Cell, sequences: int) -> Path:
        """The folder of the cell's training sequences, made if it is not there."""
        budget = cell.budget
        folder = self.work / "data" / f"{cell.data}-{sequences}x{budget.max_length}-seed{cell.seed}"
        sizes = ["--sequences", sequences, "--max_length", budget.max_length, "--seed", cell.seed]
        shards = ["--batch_size=50", "--sequences_per_shard=50"]
        source = ["--strategy", cell.data] if cell.data in ("top1", "sample", "hybrid") else ["--corpus", cell.data]
        generate = [sys.executable, _LAUNCH / "generate.py", "--model", self.model, "--output", folder]
        self.stages.run("generate", generate, sizes, shards, source)
        return folder

    def collect(self, tables: dict[str, list[tuple[int, Cell]]]) -> None:
        """Write each table: the cells that there are, in the recipe's order."""
        for table, cells in tables.items():
            rows = [_row(json.loads(self.result(cell).read_text())) for _, cell in cells if self.is_done(cell)]
            write_atomically(self.reproduction.output / f"{table}.json", json.dumps(rows, indent=1) + "\n")


def _row(result: dict[str, Any]) -> dict[str, Any]:
    """A cell as it stands in a table: everything but what was measured window by window or step by step."""
    row = {key: value for key, value in result.items() if key not in ("texts", "stage_seconds")}
    trained = {key: value for key, value in row["budget"]["trained"].items() if key != "kl"}
    row["budget"] = row["budget"] | {"trained": trained}
    for measure in ("perplexity", "nll", "nll_stderr", "kl", "kl_stderr"):
        row[measure] = {text: score[measure] for text, score in result["texts"].items()}
    return row


def _flat(cell: Cell) -> dict[str, Any]:
    settings = {**asdict(cell.quant), **asdict(cell.budget), "data": cell.data, "loss": cell.loss, "seed": cell.seed}
    return {"method": cell.method, **settings}


def _bits(short: str) -> dict[str, Any]:
    """The three bit-widths of the field's short form, W-A-KV."""
    return dict(zip(("w_bits", "a_bits", "kv_bits"), map(int, short.split("-")), strict=True))


def _flags(config: Any) -> list[str]:
    return [f"--{key}={value}" for key, value in asdict(config).items()]


if __name__ == "__main__":
    cli.run(main)
