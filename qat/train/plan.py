"""The needs of training a model: memory of each GPU, of the host and of NVMe, and the time of a step: the formulas.

docs/training.md explains them, with what they were checked against. Nothing is loaded: the model is built on the meta
device from its config.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from qat.quant.architecture import architecture_of, decoder_layers, is_tied
from qat.quant.config import QuantConfig
from qat.quant.layer_settings import layer_settings, vocabulary_settings
from qat.quant.packing import bytes_of_rows, makes_rows
from qat.runtime.errors import UserError
from qat.runtime.memory import PROCESS
from qat.train import deepspeed_json, flops
from qat.train.distill import CHUNK_TOKENS, VOCABULARY_BLOCK

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_KEPT_ON_CPU = {"alone": 0.55, "with others": 1.0}
"""Fraction of the temporary memory that a CPU rank holds in addition: freed memory that the C library keeps in pieces
(qat/runtime/malloc.py), and gloo's copies of what ranks exchange. Fitted to two models; docs/training.md checks it on a
third."""

_FILLED = 0.9
"""Fraction of a rank's memory that a plan may fill for a whole teacher, or with codes that are kept: plans are
estimates, and the run works without either."""

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
        gpus: number of GPUs in all, one rank each
        nodes: number of nodes
        gpu_memory: GB of each GPU
        host_memory: GB of each node
        nvme: GB of each node's NVMe disks
        flops: dense bf16 FLOP/s of a GPU
        efficiency: fraction of peak FLOP/s that a step's matmuls reach
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
        device: bytes that stay on the rank's GPU; without GPUs, in its process
        passing: the most that forward and backward, or the optimizer step, hold in addition
        host: bytes of a node's memory, for all of its ranks
        nvme: bytes on a node's disks
        received_per_step: bytes that a rank receives from the others
        kept_codes: the part of ``device`` in which a rank keeps gathered codes until the weights change
        seconds: seconds of a step, by cause
        fetches: how often DeepSpeed fetches a decoder layer, or a module in it, for a rank's forward and backward
            passes over one row: each is some Python hooks and, unless the weights are there, collectives
        whole_teacher: whether each rank holds all of the teacher
    """

    device: Mapping[str, float]
    passing: Mapping[str, float]
    host: float
    nvme: float
    received_per_step: float
    kept_codes: float
    seconds: Mapping[str, float]
    fetches: int
    whole_teacher: bool

    @property
    def needs(self) -> Mapping[str, float]:
        """Return the most bytes that a rank holds, by purpose."""
        return {**self.device, "transient": at_once(self.passing)}

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


def holds_teacher(model: "PreTrainedModel", ds_config: dict[str, Any], tokens: int, device: str, memory: float) -> bool:
    """Return whether a rank with ``memory`` bytes can hold all of ``model``, given without weights, which only runs
    forward, in the dtype of its DeepSpeed JSON, on sequences of ``tokens``; a tenth is left, since plans are
    estimates."""
    width = deepspeed_json.dtype(ds_config).itemsize
    logits = min(tokens, CHUNK_TOKENS[device]) * model.config.vocab_size * (width + 3 * 4)
    weights = width * sum(parameter.numel() for parameter in model.parameters())
    return PROCESS[device] + weights + _activations(model.config, tokens, width, True) + logits <= _FILLED * memory


def with_whole_teacher(memory: float, planned: Callable[..., Plan]) -> Plan:
    """Return the plan with the whole teacher on each rank, if that leaves a tenth of its ``memory`` (bytes), since
    plans are estimates; else the one with a sharded teacher. ``planned`` is ``training`` with all else given."""
    if memory and (whole := planned(whole_teacher=True)).peak <= _FILLED * memory:
        return whole
    return planned()


def training(
    config: "PretrainedConfig",
    student: dict[str, Any],
    teacher: dict[str, Any] | None,
    machine: Machine,
    tokens: int,
    device: str = "cuda",
    checkpointing: bool = True,
    sequences: int = 1,
    quant: QuantConfig = QuantConfig(),  # noqa: B008  # frozen
    whole_teacher: bool = False,
    memory: float = 0.0,
) -> Plan:
    """Plan the training of ``config``'s model with loss=logits.

    Args:
        student: its DeepSpeed JSON
        teacher: its DeepSpeed JSON; None if no teacher is loaded
        tokens: length of the longest sequence
        device: type of the ranks' devices: cuda or cpu
        checkpointing: whether gradient checkpointing is on
        sequences: how many a rank packs into one forward pass
        quant: the student's quantization
        whole_teacher: whether each rank holds all of the teacher, which its JSON then says nothing of
        memory: bytes of a rank, in whose rest codes are kept; without, none are
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    of_student = _Elements.of(model, student)
    parameters, output_layer = of_student.all, of_student.output_layer
    student = deepspeed_json.fetch_layers(student, of_student.layer, output_layer)
    sharded, of_teacher = None, None  # the teacher's JSON, if it means anything
    if teacher and not whole_teacher:
        sharded = deepspeed_json.fetch_layers(deepspeed_json.for_teacher(teacher), of_student.layer, output_layer)
        of_teacher = _Elements.of(model, sharded)
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
    travelling = _codes(model, quant, student, ranks)
    places["codes"] = (travelling.size / ranks, "gpu")
    if sharded:
        teacher_on = sharded["zero_optimization"].get("offload_param", {}).get("device", "gpu")
        places["teacher"] = (width * own, teacher_on)
        places["teacher's output layer"] = (width * output_layer, "gpu")
    elif teacher:
        places["teacher"] = (width * parameters, "gpu")
    in_rank = {"gpu"} if device == "cuda" else {"gpu", "cpu"}  # a CPU rank offloads to its own memory
    held = {name: size for name, (size, place) in places.items() if place in in_rank}
    held["process"] = PROCESS[device]
    by_node = ranks / machine.nodes
    host = by_node * sum(size for size, place in places.values() if place == "cpu" and place not in in_rank)
    nvme = by_node * sum(size for size, place in places.values() if place == "nvme")

    chunk = min(tokens, CHUNK_TOKENS[device])
    bucket = min(zero.get("reduce_bucket_size", 5e8), parameters)
    # A layer's gradients are taken when all are there.
    together = of_student.layer if deepspeed_json.fetches_layers(student) else 0
    gathered_teacher = max(_live(sharded, parameters), of_teacher.kept_whole) if sharded and of_teacher else 0
    passing = {
        "gathered student": width * max(_live(student, parameters), of_student.kept_whole),
        "gathered teacher": width * gathered_teacher,
        "gradients in flight": width * (2 * bucket + output_layer + together),
        "activations": _activations(config, sequences * tokens, width, checkpointing),
        "logits": chunk * config.vocab_size * (2 * width + 3 * 4) + _rounded_output(model, quant, width),
        "optimizer step": 4.0 * group if optimizer_on == "gpu" else 0.0,
    }
    if device == "cpu":
        passing["kept on CPU"] = _KEPT_ON_CPU["alone" if ranks == 1 else "with others"] * at_once(passing)
    rest = _FILLED * memory - sum(held.values()) - at_once(passing)
    kept = min(travelling.size, max(0.0, rest)) if ranks > 1 else 0.0
    held["codes"] += kept
    as_values = replace(of_student, all=of_student.all - travelling.elements)
    elements = parameters + _gathered(student, as_values)  # gradients, and weights
    if sharded and of_teacher:
        elements += _gathered(sharded, of_teacher, forward_only=True)
    codes = 0.0
    if travelling.elements:
        once = _reused(student, of_student) / travelling.elements + kept / travelling.size
        codes = travelling.size * (2 - min(1.0, once))
    received = (width * elements + codes) * (ranks - 1) / ranks
    moved = (2 * parameters - travelling.elements) * width / ranks * (parameters_on != "gpu")
    moved += (4 + width) * own * (optimizer_on != "gpu")
    if sharded:
        moved += width * own * (teacher_on != "gpu")
    passes = 3 + checkpointing + bool(teacher)  # backward counts twice
    operations = passes * sequences * flops.forward(config, flops.matrix_elements(model), tokens)
    seconds = {
        "compute": operations / (machine.flops * machine.efficiency),
        "link": received / machine.link,
        "bus": moved / machine.bus,
        "optimizer": {
            "gpu": _GPU_OPTIMIZER_TRAFFIC * own / machine.hbm,
            "cpu": _ADAM_TRAFFIC * parameters / machine.nodes / machine.host_link,
            "nvme": 2 * nvme / machine.disk,
        }[optimizer_on],
    }
    fetches = (2 + checkpointing) * _fetches(model, student) + (_fetches(model, sharded) if sharded else 0)
    whole = teacher is not None and whole_teacher
    return Plan(held, passing, host, nvme, received, kept, seconds, fetches, whole)


class _Codes(NamedTuple):
    """Weights that are gathered as codes (qat.train.code_gather): their elements; the bytes of codes and grids."""

    elements: int
    size: int


def _codes(model: "PreTrainedModel", quant: QuantConfig, ds_config: dict[str, Any], ranks: int) -> _Codes:
    """Return the weights that are gathered as codes if all weights learn."""
    zero = ds_config["zero_optimization"]
    if zero.get("offload_param", {}).get("device") == "nvme":
        return _Codes(0, 0)
    least = zero.get("stage3_param_persistence_threshold", 1e5)
    formats = layer_settings(model, quant) | vocabulary_settings(model, quant)
    weights = {model.get_parameter(f"{name}.weight"): own.weights for name, own in formats.items()}  # a tied one once
    packed = {
        weight: form
        for weight, form in weights.items()
        if weight.numel() > least and makes_rows(form, tuple(weight.shape), ranks)
    }
    size = sum(bytes_of_rows(form, tuple(weight.shape)) for weight, form in packed.items())
    return _Codes(sum(weight.numel() for weight in packed), size)


def _rounded_output(model: "PreTrainedModel", quant: QuantConfig, width: int) -> float:
    """Return the bytes that the loss holds of a quantized output layer: a code for each weight, and the values of a
    block of rows."""
    own = vocabulary_settings(model, quant).get(architecture_of(model.config).head)
    if own is None or not own.weights.quantizes:
        return 0.0
    rows = model.config.vocab_size
    return model.config.hidden_size * (rows + width * min(rows, VOCABULARY_BLOCK))


def _live(ds_config: dict[str, Any], parameters: int) -> float:
    """Return the most parameters that DeepSpeed keeps gathered."""
    zero = ds_config["zero_optimization"]
    return min(parameters, zero.get("stage3_max_live_parameters", 1e9))


def _activations(config: "PretrainedConfig", tokens: int, width: int, checkpointing: bool) -> float:
    """Return the bytes of the activations. With gradient checkpointing, which computes the student's forward pass
    twice: each block's input, and one block's own; without it, all blocks' own. A block's own are, for each token, the
    codes of the linear layers' inputs, their outputs, and what norms and SwiGLU compute between them."""
    inputs = config.num_hidden_layers * config.hidden_size * width
    block = width * (8 * config.hidden_size + 5 * config.intermediate_size)
    return tokens * (inputs + block * (1 if checkpointing else config.num_hidden_layers))


@dataclass(frozen=True)
class _Elements:
    """Numbers of a model's elements.

    Args:
        all: elements of all Parameters
        kept_whole: elements of unsharded Parameters: those too small to be worth sharding, by the JSON
        output_layer: elements of the output weight
        tied: the same again if the output weight is the embedding too, else 0
        layer: elements of the largest decoder layer
    """

    all: int
    kept_whole: int
    output_layer: int
    tied: int
    layer: int

    @classmethod
    def of(cls, model: "PreTrainedModel", ds_config: dict[str, Any]) -> "_Elements":
        sizes = [parameter.numel() for parameter in model.parameters()]
        small = ds_config["zero_optimization"].get("stage3_param_persistence_threshold", 1e5)
        layers = [sum(parameter.numel() for parameter in layer.parameters()) for layer in decoder_layers(model)]
        head = model.config.vocab_size * model.config.hidden_size
        whole = sum(size for size in sizes if size <= small)
        return cls(sum(sizes), whole, head, head if is_tied(model) else 0, max(layers))


def _gathered(ds_config: dict[str, Any], elements: _Elements, forward_only: bool = False) -> float:
    """Return the elements that a rank gathers per step, those that it has itself included.

    The student's are gathered for forward and backward, but for what stays gathered between the two, since it is used
    again soon enough: the last layers, but neither the embedding nor the output layer. What is kept whole is gathered
    once, after the optimizer's step. The teacher's are gathered for forward, but for the output layer, which is whole.
    """
    zero, sharded = ds_config["zero_optimization"], elements.all - elements.kept_whole
    twice = 2 if zero.get("stage3_use_all_reduce_for_fetch_params", False) else 1
    if forward_only:
        return twice * max(0, sharded - elements.output_layer + elements.tied)
    return twice * (2 * sharded - _reused(ds_config, elements)) + elements.kept_whole


def _reused(ds_config: dict[str, Any], elements: _Elements) -> float:
    """Return the elements that stay gathered between forward and backward."""
    sharded = elements.all - elements.kept_whole
    reused = deepspeed_json.reused(ds_config, elements.layer, elements.output_layer)
    return max(0, min(reused, sharded - 2 * elements.output_layer))


def _fetches(model: "PreTrainedModel", ds_config: dict[str, Any]) -> int:
    """Return how often decoder layers, or modules in them, are fetched in a pass over the model."""
    as_a_whole = deepspeed_json.fetches_layers(ds_config)
    return sum(1 if as_a_whole else sum(1 for _ in layer.modules()) for layer in decoder_layers(model))
