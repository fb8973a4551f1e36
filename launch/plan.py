"""What training a model will need, before it is started: memory, traffic, hours, and which DeepSpeed JSON fits.

python launch/plan.py --model llama-30b --gpus 8 --gpu_memory 80 --host_memory 1000

Nothing is loaded: the model is built on the meta device from its config. The formulas are explained in
docs/training.md, with what they were checked against.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig

from launch import cli
from qat import ds_json, flops, models
from qat.distill import CHUNK_TOKENS
from qat.errors import UserError
from qat.model_folder import read_config

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
"""The student's JSON and the teacher's that are tried, fastest first, if none is given."""

PROCESS = {"cpu": 0.57e9, "cuda": 1.5e9}
"""Bytes that a rank holds without a model: Python and the libraries, measured; on a GPU the CUDA context, assumed."""

_KEPT_ON_CPU = {"alone": 0.55, "with others": 1.0}
"""Part of what comes and goes that a CPU rank holds besides: freed memory that the C library keeps in pieces
(qat/cpu.py), and gloo's copies of what ranks exchange. Fitted to two models; docs/training.md checks it on a third."""

_OPTIMIZER_TRAFFIC = 28
"""Bytes that Adam on the host reads and writes for a parameter: weight, moments (both ways), and gradient, in fp32."""


@dataclass(frozen=True)
class Question:
    """What is to be trained.

    Args:
        model: a Hugging Face directory, config.json or hub name, or llama-7b, llama-13b, llama-30b
        deepspeed: DeepSpeed configuration of the student; by default those of ds_configs/ are tried in turn
        teacher_deepspeed: DeepSpeed configuration of the teacher, beside deepspeed; by default the same
        tokens: length of the sequences
        sequences: how many sequences are trained on
    """

    model: str
    deepspeed: Path | None = None
    teacher_deepspeed: Path | None = None
    tokens: int = 1024
    sequences: int = 100_000

    def __post_init__(self) -> None:
        if self.teacher_deepspeed and not self.deepspeed:
            raise UserError(
                f"teacher_deepspeed={self.teacher_deepspeed} without deepspeed: give both, or neither to try all ways."
            )


@dataclass(frozen=True)
class Machine:
    """What it is to be trained on. The defaults are a node of 8 H100.

    Args:
        gpus: GPUs, one rank each
        nodes: nodes that share them
        gpu_memory: GB of each GPU
        host_memory: GB of each node
        nvme: GB of each node's NVMe disks
        flops: dense bf16 FLOP/s of a GPU
        efficiency: the part of them that a step's matrix products reach
        link: bytes/s that a GPU receives from the others: NVLink in a node, the network between nodes
        bus: bytes/s between a GPU and the host
        host_link: bytes/s of a node's memory
        disk: bytes/s of a node's NVMe disks
    """

    gpus: int = 8
    nodes: int = 1
    gpu_memory: float = 80
    host_memory: float = 1000
    nvme: float = 0
    flops: float = 989e12
    efficiency: float = 0.4
    link: float = 200e9
    bus: float = 25e9
    host_link: float = 300e9
    disk: float = 12e9

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) < 0 or (field.name != "nvme" and getattr(self, field.name) == 0):
                raise UserError(f"{field.name}={getattr(self, field.name)} is not possible: give more than 0.")
        if self.gpus % self.nodes:
            raise UserError(f"gpus={self.gpus} cannot be shared by nodes={self.nodes}: give a multiple.")


@dataclass(frozen=True)
class Plan:
    """Bytes, per rank unless said, by what they are for; and the seconds of a step.

    Attributes:
        device: what stays on the rank's GPU
        passing: the most that forward and backward, or the optimizer step, hold besides
        host: of a node's memory, by all of its ranks
        nvme: of a node's disks
        received_per_step: what a rank receives from the others
        seconds: of a step, by what takes them
    """

    device: Mapping[str, float]
    passing: Mapping[str, float]
    host: float
    nvme: float
    received_per_step: float
    seconds: Mapping[str, float]

    @property
    def peak(self) -> float:
        return sum(self.device.values()) + at_once(self.passing)

    @property
    def step_seconds(self) -> float:
        """Traffic between GPUs hides behind the computation; the host's optimizer does not."""
        return max(self.seconds["compute"], self.seconds["link"], self.seconds["bus"]) + self.seconds["optimizer"]

    def missing(self, machine: Machine) -> str:
        """Why the machine is too small; empty if it is not."""
        needs = {
            f"{self.peak / 1e9:.0f} GB on each GPU": self.peak > machine.gpu_memory * 1e9,
            f"{self.host / 1e9:.0f} GB of host memory": self.host > machine.host_memory * 1e9,
            f"{self.nvme / 1e9:.0f} GB of NVMe": self.nvme > machine.nvme * 1e9,
        }
        return ", ".join(need for need, lacking in needs.items() if lacking)


def at_once(passing: Mapping[str, float]) -> float:
    """Gathered weights and buckets stay during the optimizer's step; activations and logits are gone by then."""
    return sum(passing.values()) - min(passing["activations"] + passing["logits"], passing["optimizer step"])


def main() -> None:
    question, machine = cli.parse(__doc__, Question, Machine)
    config = config_of(question.model)
    ways = [(question.deepspeed, question.teacher_deepspeed or question.deepspeed)] if question.deepspeed else None
    ways = ways or [(Path("ds_configs") / student, Path("ds_configs") / teacher) for student, teacher in WAYS]
    plans = {}
    for student, teacher in ways:
        plans[student.name] = plan(config, ds_json.read(student), ds_json.read(teacher), machine, question.tokens)
    Console(width=140).print(table(question, machine, plans))
    fitting = [name for name, found in plans.items() if not found.missing(machine)]
    if not fitting:
        print("None fits: " + "; ".join(f"{name} needs {found.missing(machine)}" for name, found in plans.items()))
        return
    hours = plans[fitting[0]].step_seconds * question.sequences / machine.gpus / 3600
    print(f"{fitting[0]} fits: about {hours:.1f} hours for {question.sequences} sequences of {question.tokens} tokens.")


def config_of(model: str) -> PretrainedConfig:
    if model in LLAMA:
        hidden, intermediate, layers, heads = LLAMA[model]
        return LlamaConfig(
            vocab_size=32000, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
            num_attention_heads=heads,
        )  # fmt: skip
    try:
        return read_config(models.resolve(model) if model == models.EMBEDDED else model)
    except UserError as error:
        raise UserError(f"{error} Without a model: {', '.join(LLAMA)}.") from error


def plan(
    config: PretrainedConfig, student: dict[str, Any], teacher: dict[str, Any], machine: Machine, tokens: int
) -> Plan:
    """The needs of training ``config``'s model by two DeepSpeed JSONs, one sequence per rank and step."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    output_layer = config.vocab_size * config.hidden_size
    ranks, zero = machine.gpus, student["zero_optimization"]
    own = parameters / ranks
    bf16 = student.get("bf16", {}).get("enabled", False)
    width = 2 if bf16 else 4  # bytes of a number that is computed with

    parameters_on = zero.get("offload_param", {}).get("device", "gpu")
    optimizer_on = zero.get("offload_optimizer", {}).get("device", "gpu")
    teacher_on = teacher["zero_optimization"].get("offload_param", {}).get("device", "gpu")
    group = min(own, zero.get("sub_group_size", 1e9))
    states = (12 if bf16 else 8) * own  # master weights and two moments; in fp32 the weights are their own master
    places = {
        "parameters": (width * own, parameters_on),
        "gradients": (4 * own, "gpu" if optimizer_on == "gpu" else "cpu"),
        "optimizer states": (states, optimizer_on),
        "gradients again, for the optimizer": (4 * own, "gpu" if optimizer_on == "gpu" else optimizer_on),
        "teacher": (width * own, teacher_on),
    }
    if optimizer_on == "gpu":
        del places["gradients again, for the optimizer"]  # made for one group at a time
    device = {name: size for name, (size, place) in places.items() if place == "gpu"}
    device["process"] = PROCESS["cuda" if bf16 else "cpu"]
    by_node = ranks / machine.nodes
    host = by_node * sum(size for size, place in places.values() if place == "cpu")
    nvme = by_node * sum(size for size, place in places.values() if place == "nvme")

    chunk = min(tokens, CHUNK_TOKENS["cuda" if bf16 else "cpu"])
    bucket = min(zero.get("reduce_bucket_size", 5e8), parameters)
    passing = {
        "gathered student": width * _live(student, parameters),
        "gathered teacher": width * _live(teacher, parameters),
        "gradients in flight": width * (2 * bucket + output_layer),
        "activations": _activations(config, tokens, width),
        "logits": chunk * config.vocab_size * (2 * width + 3 * 4),
        "optimizer step": 4.0 * group if optimizer_on == "gpu" else 0.0,
    }
    if not bf16:
        passing["kept on CPU"] = _KEPT_ON_CPU["alone" if ranks == 1 else "with others"] * at_once(passing)
    received = _received(student, teacher, parameters, output_layer, ranks, width)
    moved = (2 * width * own * (parameters_on != "gpu")) + width * own * (teacher_on != "gpu")
    moved += (4 + width) * own * (optimizer_on != "gpu")
    seconds = {
        "compute": 5 * flops.forward(config, tokens) / (machine.flops * machine.efficiency),  # see _activations
        "link": received / machine.link,
        "bus": moved / machine.bus,
        "optimizer": {
            "gpu": 0.0,
            "cpu": _OPTIMIZER_TRAFFIC * parameters / machine.nodes / machine.host_link,
            "nvme": 2 * nvme / machine.disk,
        }[optimizer_on],
    }
    return Plan(device, passing, host, nvme, received, seconds)


def _live(ds_config: dict[str, Any], parameters: int) -> float:
    """Parameters that DeepSpeed keeps gathered at most."""
    zero = ds_config["zero_optimization"]
    return min(parameters, zero.get("stage3_max_live_parameters", 1e9))


def _activations(config: PretrainedConfig, tokens: int, width: int) -> float:
    """With gradient checkpointing, which computes the student's forward pass twice: each block's input, and one block's
    own. Those are, for each token, the codes of the linear layers' inputs, their outputs, and what norms and SwiGLU
    compute between them."""
    inputs = config.num_hidden_layers * config.hidden_size * width
    block = width * (8 * config.hidden_size + 5 * config.intermediate_size)
    return tokens * (inputs + block)


def _received(
    student: dict[str, Any], teacher: dict[str, Any], parameters: int, output_layer: int, ranks: int, width: int
) -> float:
    """Weights for the student's forward and backward and the teacher's forward, and the gradients' parts.

    What is used again soon enough stays gathered between the student's two passes: the last blocks, but neither the
    embedding nor the output layer.
    """
    reuse = student["zero_optimization"].get("stage3_max_reuse_distance", 1e9)
    kept = min(_live(student, parameters), reuse / 2, parameters - 2 * output_layer)
    elements = 0.0
    for ds_config, gathered in ((student, 2 * parameters - kept), (teacher, parameters)):
        by_reduction = ds_config["zero_optimization"].get("stage3_use_all_reduce_for_fetch_params", False)
        elements += gathered * (2 if by_reduction else 1)
    return width * (elements + parameters) * (ranks - 1) / ranks


def table(question: Question, machine: Machine, plans: dict[str, Plan]) -> Table:
    """One column for each way."""
    title = f"{question.model}: {machine.gpus} GPUs of {machine.gpu_memory:g} GB, {question.tokens} tokens"
    result = Table("GB per rank, unless said", *plans, title=title)
    some = next(iter(plans.values()))
    names = list(dict.fromkeys(name for found in plans.values() for name in found.device))
    for name in names:
        result.add_row(name, *(_gb(found.device.get(name, 0.0)) for found in plans.values()))
    for name in some.passing:
        result.add_row(f"  at times: {name}", *(_gb(found.passing[name]) for found in plans.values()))
    result.add_row("peak", *(f"{found.peak / 1e9:.1f}" for found in plans.values()), style="bold")
    result.add_row("host memory of a node", *(_gb(found.host) for found in plans.values()))
    result.add_row("NVMe of a node", *(_gb(found.nvme) for found in plans.values()))
    result.add_row("received per step", *(_gb(found.received_per_step) for found in plans.values()))
    result.add_row("seconds per step", *(f"{found.step_seconds:.2f}" for found in plans.values()))
    result.add_row("fits", *("yes" if not found.missing(machine) else "no" for found in plans.values()), style="bold")
    return result


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f}" if size else "-"


if __name__ == "__main__":
    cli.run(main)
