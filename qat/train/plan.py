"""The needs of training a model: memory of each GPU, of the host and of NVMe, and the time of a step: the formulas.

docs/training.md explains them, with what they were checked against. Nothing is loaded: the model is built on the meta
device from its config.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from qat.quant.architecture import architecture_of
from qat.quant.config import QuantConfig
from qat.quant.prepare import vocabulary_settings
from qat.runtime.errors import UserError
from qat.runtime.memory import PROCESS
from qat.train import flops
from qat.train.distill import CHUNK_TOKENS, VOCABULARY_BLOCK

_KEPT_ON_CPU = {"alone": 0.55, "with others": 1.0}
"""Fraction of the temporary memory that a CPU rank holds in addition: freed memory that the C library keeps in pieces
(qat/runtime/malloc.py), and gloo's copies of what ranks exchange. Fitted to two models; docs/training.md checks it on a
third."""

_ADAM_TRAFFIC = 28
"""Bytes that Adam reads and writes per parameter: weight and moments (both ways), and gradient, in fp32."""

_GPU_OPTIMIZER_TRAFFIC = _ADAM_TRAFFIC + 42
"""Bytes that a GPU's optimizer step reads and writes per parameter. DeepSpeed adds to Adam's: the norm of the fp32
gradient in fp64 (read 4, write 8, read 8), the gradients copied side by side (4 + 4), clipped (4 + 4), and the weights
rounded to bf16 (4 + 2)."""


@dataclass(frozen=True)
class Machine:
    """The machine to train on. The defaults are a node of 8 H100.

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
        hbm: bytes/s of a GPU's memory
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
    hbm: float = 3.0e12
    host_link: float = 300e9
    disk: float = 12e9

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) < 0 or (field.name != "nvme" and getattr(self, field.name) == 0):
                raise UserError(f"{field.name}={getattr(self, field.name)} is invalid: choose more than 0.")
        if self.gpus % self.nodes:
            raise UserError(f"gpus={self.gpus} cannot be shared by nodes={self.nodes}: give a multiple.")


@dataclass(frozen=True)
class Plan:
    """Bytes, per rank unless stated otherwise, by purpose; and the seconds of a step.

    Attributes:
        device: what stays on the rank's GPU; without GPUs, in its process
        passing: the most that forward and backward, or the optimizer step, hold in addition
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
    def needs(self) -> Mapping[str, float]:
        """Return the most bytes that a rank holds, by purpose."""
        return {**self.device, "at times": at_once(self.passing)}

    @property
    def peak(self) -> float:
        return sum(self.needs.values())

    @property
    def step_seconds(self) -> float:
        """Return the seconds of a step. Traffic between GPUs hides behind the computation; the optimizer does not."""
        return max(self.seconds["compute"], self.seconds["link"], self.seconds["bus"]) + self.seconds["optimizer"]

    def missing(self, machine: Machine) -> str:
        """Return the needs that the machine is too small for; empty if there are none."""
        needs = {
            f"{self.peak / 1e9:.0f} GB on each GPU": self.peak > machine.gpu_memory * 1e9,
            f"{self.host / 1e9:.0f} GB of host memory": self.host > machine.host_memory * 1e9,
            f"{self.nvme / 1e9:.0f} GB of NVMe": self.nvme > machine.nvme * 1e9,
        }
        return ", ".join(need for need, lacking in needs.items() if lacking)


def at_once(passing: Mapping[str, float]) -> float:
    """Return the largest sum of temporary bytes. Gathered weights and buckets stay during the optimizer's step;
    activations and logits are gone by then."""
    return sum(passing.values()) - min(passing["activations"] + passing["logits"], passing["optimizer step"])


def training(
    config: PretrainedConfig,
    student: dict[str, Any],
    teacher: dict[str, Any] | None,
    machine: Machine,
    tokens: int,
    device: str = "cuda",
    checkpointing: bool = True,
    sequences: int = 1,
    quant: QuantConfig | None = None,
) -> Plan:
    """Plan the training of ``config``'s model with loss=logits.

    Args:
        student: its DeepSpeed JSON
        teacher: its DeepSpeed JSON; None if no teacher is loaded
        tokens: length of the longest sequence
        device: type of the ranks' devices: cuda or cpu
        checkpointing: whether gradient checkpointing is on
        sequences: how many a rank packs into one forward pass
        quant: the student's quantization, which matters if it is that of the output layer too
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    output_layer = config.vocab_size * config.hidden_size
    ranks, zero = machine.gpus, student["zero_optimization"]
    own = parameters / ranks
    bf16 = student.get("bf16", {}).get("enabled", False)
    width = 2 if bf16 else 4  # bytes of a number in the computation

    parameters_on = zero.get("offload_param", {}).get("device", "gpu")
    optimizer_on = zero.get("offload_optimizer", {}).get("device", "gpu")
    group = min(own, zero.get("sub_group_size", 1e9))
    states = (12 if bf16 else 8) * own  # master weights and two moments; in fp32 the weights are their own master
    places = {
        "parameters": (width * own, parameters_on),
        "gradients": (4 * own, "gpu" if optimizer_on == "gpu" else "cpu"),
        "optimizer states": (states, optimizer_on),
        "gradients again, for the optimizer": (4 * own, "gpu" if optimizer_on == "gpu" else optimizer_on),
    }
    if optimizer_on == "gpu":
        del places["gradients again, for the optimizer"]  # made for one group at a time
    if teacher:
        teacher_on = teacher["zero_optimization"].get("offload_param", {}).get("device", "gpu")
        places["teacher"] = (width * own, teacher_on)
    in_rank = {"gpu"} if device == "cuda" else {"gpu", "cpu"}  # a CPU rank offloads to its own memory
    held = {name: size for name, (size, place) in places.items() if place in in_rank}
    held["process"] = PROCESS[device]
    by_node = ranks / machine.nodes
    host = by_node * sum(size for size, place in places.values() if place == "cpu" and place not in in_rank)
    nvme = by_node * sum(size for size, place in places.values() if place == "nvme")

    chunk = min(tokens, CHUNK_TOKENS[device])
    bucket = min(zero.get("reduce_bucket_size", 5e8), parameters)
    passing = {
        "gathered student": width * _live(student, parameters),
        "gathered teacher": width * _live(teacher, parameters) if teacher else 0.0,
        "gradients in flight": width * (2 * bucket + output_layer),
        "activations": _activations(config, sequences * tokens, width, checkpointing),
        "logits": chunk * config.vocab_size * (2 * width + 3 * 4) + _rounded_output(model, quant, width),
        "optimizer step": 4.0 * group if optimizer_on == "gpu" else 0.0,
    }
    if device == "cpu":
        passing["kept on CPU"] = _KEPT_ON_CPU["alone" if ranks == 1 else "with others"] * at_once(passing)
    received = _received(student, teacher, parameters, output_layer, ranks, width)
    moved = (2 * width * own * (parameters_on != "gpu")) + (4 + width) * own * (optimizer_on != "gpu")
    if teacher:
        moved += width * own * (teacher_on != "gpu")
    passes = 3 + checkpointing + bool(teacher)  # backward counts twice
    seconds = {
        "compute": passes * sequences * flops.forward(config, tokens) / (machine.flops * machine.efficiency),
        "link": received / machine.link,
        "bus": moved / machine.bus,
        "optimizer": {
            "gpu": _GPU_OPTIMIZER_TRAFFIC * own / machine.hbm,
            "cpu": _ADAM_TRAFFIC * parameters / machine.nodes / machine.host_link,
            "nvme": 2 * nvme / machine.disk,
        }[optimizer_on],
    }
    return Plan(held, passing, host, nvme, received, seconds)


def _rounded_output(model: PreTrainedModel, quant: QuantConfig | None, width: int) -> float:
    """Return the bytes that the loss holds of a quantized output layer: a code for each weight, and the values of a
    block of rows."""
    if quant is None or not quant.overrides:
        return 0.0
    own = vocabulary_settings(model, quant).get(architecture_of(model.config).head)
    if own is None or not own.weights.quantizes:
        return 0.0
    rows = model.config.vocab_size
    return model.config.hidden_size * (rows + width * min(rows, VOCABULARY_BLOCK))


def _live(ds_config: dict[str, Any], parameters: int) -> float:
    """Return the most parameters that DeepSpeed keeps gathered."""
    zero = ds_config["zero_optimization"]
    return min(parameters, zero.get("stage3_max_live_parameters", 1e9))


def _activations(config: PretrainedConfig, tokens: int, width: int, checkpointing: bool) -> float:
    """Return the bytes of the activations. With gradient checkpointing, which computes the student's forward pass
    twice: each block's input, and one block's own; without it, all blocks' own. A block's own are, for each token, the
    codes of the linear layers' inputs, their outputs, and what norms and SwiGLU compute between them."""
    inputs = config.num_hidden_layers * config.hidden_size * width
    block = width * (8 * config.hidden_size + 5 * config.intermediate_size)
    return tokens * (inputs + block * (1 if checkpointing else config.num_hidden_layers))


def _received(
    student: dict[str, Any],
    teacher: dict[str, Any] | None,
    parameters: int,
    output_layer: int,
    ranks: int,
    width: int,
) -> float:
    """Return the bytes that a rank receives per step: weights for the student's forward and backward and the teacher's
    forward, and the gradients' parts.

    Weights that are used again soon enough stay gathered between the student's two passes: the last blocks, but neither
    the embedding nor the output layer.
    """
    reuse = student["zero_optimization"].get("stage3_max_reuse_distance", 1e9)
    kept = min(_live(student, parameters), reuse / 2, parameters - 2 * output_layer)
    gathered = [(student, 2 * parameters - kept)] + ([(teacher, float(parameters))] if teacher else [])
    elements = 0.0
    for ds_config, number in gathered:
        by_reduction = ds_config["zero_optimization"].get("stage3_use_all_reduce_for_fetch_params", False)
        elements += number * (2 if by_reduction else 1)
    return width * (elements + parameters) * (ranks - 1) / ranks
