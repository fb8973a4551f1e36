"""Estimate the memory, traffic and time of a training run, and choose a DeepSpeed JSON.

python launch/plan.py --model llama-30b --gpus 8 --gpu_memory 80 --host_memory 1000

The formulas are those of qat/train/plan.py; docs/training.md explains them.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.table import Table

from launch import cli
from qat.quant.config import QuantConfig
from qat.runtime.errors import UserError, check_least
from qat.store import models, smollm2
from qat.store.model_folder import check_runs, read_config, without_weights
from qat.train import deepspeed_json, plan
from qat.train.plan import Machine, Plan

if TYPE_CHECKING:
    from transformers import PretrainedConfig

LLAMA = {
    "llama-7b": (4096, 11008, 32, 32),
    "llama-13b": (5120, 13824, 40, 40),
    "llama-30b": (6656, 17920, 60, 52),
}
"""Width, width of the MLP, layers and heads of LLaMA (arXiv 2302.13971), for planning without a checkpoint."""

WAYS = (
    ("zero3.json", "teacher_zero3.json"),
    ("zero3_offload_optimizer.json", "teacher_zero3.json"),
    ("zero3_offload.json", "teacher_zero3_offload.json"),
    ("zero3_nvme.json", "teacher_zero3_offload.json"),
)
"""The pairs of student's and teacher's JSON that are tried, fastest first, if none is given."""


@dataclass(frozen=True)
class Question:
    """The training to plan.

    Args:
        model: a Hugging Face directory, config.json or hub name, or llama-7b, llama-13b, llama-30b
        deepspeed: DeepSpeed configuration of the student; by default those of ds_configs/ are tried in turn
        teacher_deepspeed: DeepSpeed configuration of a sharded teacher; needs deepspeed. By default each rank holds all
            of the teacher if it fits, otherwise it is sharded by the student's configuration
        tokens: tokens per sequence
        sequences: number of training sequences
        micro_batch_size: sequences that a rank packs into one forward pass
        gradient_checkpointing: recompute activations in backward, as launch/train.py does by default
    """

    model: str
    deepspeed: Path | None = None
    teacher_deepspeed: Path | None = None
    tokens: int = 1024
    sequences: int = 100_000
    micro_batch_size: int = 1
    gradient_checkpointing: bool = True

    def __post_init__(self) -> None:
        check_least(self, tokens=1, sequences=1, micro_batch_size=1)
        if self.teacher_deepspeed and not self.deepspeed:
            raise UserError(
                f"teacher_deepspeed={self.teacher_deepspeed} without deepspeed: give both, or neither to try all ways."
            )


def main() -> None:
    question, machine, quant = cli.parse(__doc__, Question, Machine, QuantConfig)
    config = config_of(question.model)
    ways = [(question.deepspeed, question.teacher_deepspeed or question.deepspeed)] if question.deepspeed else None
    ways = ways or [(deepspeed_json.SHIPPED / student, deepspeed_json.SHIPPED / teacher) for student, teacher in WAYS]
    plans = {}
    for student, teacher in ways:
        student_json, teacher_json = deepspeed_json.read(student), deepspeed_json.read(teacher)
        device = "cuda" if deepspeed_json.dtype(student_json) == torch.bfloat16 else "cpu"
        checkpointing, packed = question.gradient_checkpointing, question.micro_batch_size
        whole = 0.0 if question.teacher_deepspeed else machine.gpu_memory * 1e9
        given = (config, student_json, teacher_json, machine, question.tokens, device, checkpointing, packed, quant)
        planned = partial(plan.training, *given, memory=machine.gpu_memory * 1e9)
        plans[student.name] = plan.with_whole_teacher(whole, planned)
    Console(width=140).print(table(question, machine, plans))
    fitting = [name for name, found in plans.items() if not found.missing(machine)]
    if not fitting:
        print("None fits: " + "; ".join(f"{name} needs {found.missing(machine)}" for name, found in plans.items()))
        return
    per_step = machine.gpus * question.micro_batch_size
    hours = plans[fitting[0]].step_seconds * question.sequences / per_step / 3600
    print(f"{fitting[0]} fits: about {hours:.1f} hours for {question.sequences} sequences of {question.tokens} tokens.")


def config_of(model: str) -> "PretrainedConfig":
    from transformers import LlamaConfig

    if model in LLAMA:
        hidden, intermediate, layers, heads = LLAMA[model]
        return LlamaConfig(
            vocab_size=32000, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
            num_attention_heads=heads,
        )  # fmt: skip
    name = models.resolve(model) if model == smollm2.EMBEDDED else model
    try:
        config = read_config(name)
    except UserError as error:
        raise UserError(f"{error} Without a model: {', '.join(LLAMA)}.") from error
    check_runs(without_weights(config, Path(name)), Path(name))
    return config


def table(question: Question, machine: Machine, plans: dict[str, Plan]) -> Table:
    """Return a table with one column for each plan."""
    title = f"{question.model}: {machine.gpus} GPUs of {machine.gpu_memory:g} GB, {question.tokens} tokens"
    result = Table("GB per rank, unless stated otherwise", *plans, title=title)
    some = next(iter(plans.values()))
    names = list(dict.fromkeys(name for found in plans.values() for name in found.device))
    for name in names:
        result.add_row(name, *(_gb(found.device.get(name, 0.0)) for found in plans.values()))
    for name in some.passing:
        result.add_row(f"  transient: {name}", *(_gb(found.passing[name]) for found in plans.values()))
    result.add_row("peak", *(f"{found.peak / 1e9:.1f}" for found in plans.values()), style="bold")
    result.add_row("host memory of a node", *(_gb(found.host) for found in plans.values()))
    result.add_row("NVMe of a node", *(_gb(found.nvme) for found in plans.values()))
    result.add_row("received per step", *(_gb(found.received_per_step) for found in plans.values()))
    result.add_row("teacher on each rank", *("whole" if found.whole_teacher else "a part" for found in plans.values()))
    result.add_row("layer fetches per forward/backward row", *(f"{found.fetches}" for found in plans.values()))
    result.add_row("seconds per step", *(f"{found.step_seconds:.2f}" for found in plans.values()))
    result.add_row("fits", *("yes" if not found.missing(machine) else "no" for found in plans.values()), style="bold")
    return result


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f}" if size else "-"


if __name__ == "__main__":
    cli.run(main)
