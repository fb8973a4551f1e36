"""QuantConfig, and ``prepare``: the one place that knows where a model's Linear layers are."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qat import kv_cache
from qat.errors import UserError, check_choice
from qat.files import load_tensors, save_tensors, write_atomically, writing
from qat.linear import InputQuantizer, QuantLinear
from qat.quantizers import FULL_PRECISION, Format, Grid, lsq_initial_step

CONFIG_FILE = "quant_config.json"
"""Lies beside the weights of every quantized model directory."""

STEPS_FILE = "activation_steps.safetensors"
"""Beside them too, where activations have learned steps: they are no weights of the architecture."""

STEP_SUFFIX = ".input_step"

GRIDS_FILE = "weight_grids.safetensors"
"""Beside them as well, where the weights lie on a grid that their own largest values do not give: GPTQ's."""

_GRIDS = "weight_grids"
"""The entry of ``quant_config.json`` that names it."""

SUPPORTED_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")

_CHOICES = {
    "w_quantizer": ("minmax", "minmax_asymmetric", "statsq"),
    "a_quantizer": ("minmax", "minmax_asymmetric", "lsq"),
    "kv_quantizer": ("minmax", "minmax_asymmetric"),
    "kv_site": ("post_rope", "pre_rope"),
    "kv_granularity": ("token_head", "token"),
    "kv_rotation": ("none", "hadamard"),
}
SHARED_INPUTS = (
    ("self_attn", ("q_proj", "k_proj", "v_proj")),
    ("self_attn", ("o_proj",)),
    ("mlp", ("gate_proj", "up_proj")),
    ("mlp", ("down_proj",)),
)
"""The Linear layers of a decoder block, grouped by the tensor that they read."""


@dataclass(frozen=True)
class QuantConfig:
    """What is quantized, and how. Embedding, norms and lm_head stay in full precision (the paper's choice).

    Args:
        w_bits: weights: 2 to 8, or 16 for full precision
        a_bits: inputs of the linear layers: 2 to 8, or 16
        kv_bits: KV cache: 2 to 8, or 16
        w_quantizer: minmax (symmetric, no clipping: the paper), minmax_asymmetric, or statsq (clips; the paper's
            comparison), with one scale per output channel
        a_quantizer: minmax, minmax_asymmetric (one scale per token), or lsq (one learned step per layer; clips)
        kv_quantizer: minmax or minmax_asymmetric
        w_group_size: weights share a scale in groups of so many input channels; 0 for one scale per output channel
        kv_site: post_rope (what a cache stores) or pre_rope (the paper's released code)
        kv_granularity: token_head (one scale per token and KV head) or token (one per token, the paper)
        kv_rotation: none (the paper) or hadamard (rotates Q, K and V over head_dim; needs post_rope)
    """

    w_bits: int = 4
    a_bits: int = 8
    kv_bits: int = 4
    w_quantizer: str = "minmax"
    a_quantizer: str = "minmax"
    kv_quantizer: str = "minmax"
    w_group_size: int = 0
    kv_site: str = "post_rope"
    kv_granularity: str = "token_head"
    kv_rotation: str = "none"

    def __post_init__(self) -> None:
        for name in ("w_bits", "a_bits", "kv_bits"):
            bits = getattr(self, name)
            if bits not in (2, 3, 4, 5, 6, 7, 8, FULL_PRECISION):
                raise UserError(f"{name}={bits} is not possible: give 2 to 8, or 16 for full precision.")
        check_choice(self, **_CHOICES)
        if self.w_group_size < 0 or self.w_group_size % 2:  # two 4-bit codes lie in a byte
            raise UserError(f"w_group_size={self.w_group_size} is not possible: give 0, or 32, 64, 128.")
        if self.kv_rotation == "hadamard" and self.kv_site == "pre_rope":
            raise UserError(
                "kv_rotation=hadamard needs kv_site=post_rope: a rotation before RoPE would change the "
                "attention scores."
            )

    def __str__(self) -> str:
        """The field's short form, W-A-KV: 4-8-4."""
        return f"{self.w_bits}-{self.a_bits}-{self.kv_bits}"

    @property
    def weights(self) -> Format:
        return Format(self.w_bits, self.w_quantizer, self.w_group_size)

    @property
    def activations(self) -> Format:
        return Format(self.a_bits, self.a_quantizer)

    @property
    def kv(self) -> Format:
        return Format(self.kv_bits, self.kv_quantizer)

    def save(self, directory: Path) -> None:
        """Write ``quant_config.json``, which also says whether there are grids beside it."""
        grids = {_GRIDS: GRIDS_FILE} if (directory / GRIDS_FILE).is_file() else {}
        with writing(directory):
            write_atomically(directory / CONFIG_FILE, json.dumps(asdict(self) | grids, indent=2) + "\n")

    @classmethod
    def load(cls, directory: Path) -> "QuantConfig":
        """Read ``quant_config.json``; raises UserError if it names grids that are missing."""
        path = directory / CONFIG_FILE
        values = json.loads(path.read_text())
        if (grids := values.pop(_GRIDS, None)) and not (directory / grids).is_file():
            raise UserError(
                f"{directory} is incomplete: {grids}, by which its weights are rounded, is missing. Copy it again."
            )
        unknown = set(values) - {field.name for field in fields(cls)}
        if unknown:
            raise UserError(f"{path} has unknown settings {sorted(unknown)}: it was written by another version.")
        return cls(**values)


def prepare(model: PreTrainedModel, config: QuantConfig) -> PreTrainedModel:
    """Quantize ``model`` in place as ``config`` says; with 16-16-16 nothing is touched.

    Raises UserError for an architecture whose blocks are not known, or a head_dim that cannot be rotated.
    """
    check_supported(model)
    if config.kv_rotation == "hadamard":
        _check_rotatable(model)
    for layer in model.base_model.layers:  # type: ignore[union-attr]
        if config.weights.quantizes or config.activations.quantizes:
            for block_name, names in SHARED_INPUTS:
                _quantize_linears([getattr(getattr(layer, block_name), name) for name in names], config)
        if config.kv.quantizes:
            _quantize_kv(layer.self_attn, config)
    if config.kv.quantizes and config.kv_site == "post_rope":
        kv_cache.attend(model)
    return model


def quant_linears(model: nn.Module) -> dict[str, QuantLinear]:
    """The quantized layers of a prepared model, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}


def quantizable_linears(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The layers of a model that ``prepare`` quantizes, by name."""
    names = [
        f"model.layers.{number}.{block_name}.{name}"
        for number in range(len(model.base_model.layers))  # type: ignore[arg-type]
        for block_name, layer_names in SHARED_INPUTS
        for name in layer_names
    ]
    return {name: model.get_submodule(name) for name in names}


@torch.no_grad()
def initialise_steps(model: nn.Module, magnitudes: dict[str, Tensor]) -> None:
    """Set LSQ's steps from the mean magnitude of each layer's input, by name."""
    for name, linear in quant_linears(model).items():
        if linear.input_step is not None:
            linear.input_step.fill_(lsq_initial_step(magnitudes[name], linear.input_format))


def save_steps(steps: dict[str, Tensor], directory: Path) -> None:
    if steps:
        save_tensors(steps, directory / STEPS_FILE)


@torch.no_grad()
def load_steps(model: nn.Module, directory: Path) -> None:
    """Set the learned steps of a prepared model; raises UserError if they are missing."""
    linears = {name: linear for name, linear in quant_linears(model).items() if linear.input_step is not None}
    if not linears:
        return
    if not (directory / STEPS_FILE).is_file():
        raise UserError(f"{directory} is incomplete: a_quantizer=lsq has learned steps, and {STEPS_FILE} is missing.")
    steps = load_tensors(directory / STEPS_FILE)
    if without := linears.keys() - {name.removesuffix(STEP_SUFFIX) for name in steps}:
        raise UserError(f"{directory} is incomplete: {STEPS_FILE} lacks {min(without)}. Copy it again.")
    for name, linear in linears.items():
        linear.input_step.copy_(steps[name + STEP_SUFFIX])  # type: ignore[union-attr]


def save_grids(grids: dict[str, Grid], path: Path) -> None:
    """Write the grids of layers, by name, into one file: ``NAME.weight_scale``, and ``NAME.weight_zero_point``."""
    tensors = {f"{name}.weight_{field}": part for name, grid in grids.items() for field, part in grid._asdict().items()}
    save_tensors({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)


def load_grids(directory: Path, file: str = GRIDS_FILE) -> dict[str, Grid]:
    """The grids that the weights at ``directory`` keep, by the layer's name; empty where their values say them."""
    if not (directory / file).is_file():
        return {}
    stored = load_tensors(directory / file)
    names = [name.removesuffix(".weight_scale") for name in stored if name.endswith(".weight_scale")]
    return {name: Grid(stored[f"{name}.weight_scale"], stored.get(f"{name}.weight_zero_point")) for name in names}


def freeze(model: nn.Module) -> None:
    """Quantize every weight once and for all: for evaluation, never for training."""
    for linear in quant_linears(model).values():
        linear.freeze()


def check_supported(model: PreTrainedModel) -> None:
    """Raise UserError unless the decoder blocks are the Linear layers that ``prepare`` expects."""
    model_type = model.config.model_type
    if model_type not in SUPPORTED_MODEL_TYPES:
        raise UserError(
            f"The architecture {model_type!r} is not supported: give a model of type "
            f"{', '.join(SUPPORTED_MODEL_TYPES)}, whose blocks are Linear layers around attention."
        )
    if getattr(model.config, "quantization_config", None) is not None:
        raise UserError("The model is quantized already: give the full-precision checkpoint.")


def _check_rotatable(model: PreTrainedModel) -> None:
    head_dim = model.base_model.layers[0].self_attn.head_dim  # type: ignore[union-attr,index]
    if head_dim & (head_dim - 1):
        raise UserError(
            f"kv_rotation=hadamard needs a head_dim that is a power of two; this model's is {head_dim}: "
            "give kv_rotation=none."
        )


def _quantize_linears(linears: list[nn.Linear], config: QuantConfig) -> None:
    inputs, shared = config.activations, None
    if inputs.quantizes and not inputs.learned:
        shared = InputQuantizer(inputs, readers=len(linears))
    for linear in linears:
        if config.w_group_size and linear.in_features % config.w_group_size:
            raise UserError(
                f"w_group_size={config.w_group_size} does not divide the model's {linear.in_features} input channels: "
                "give a divisor of all its layers' widths, say 32 or 64."
            )
        QuantLinear.convert(linear, config.weights, inputs, shared)


def _quantize_kv(attention: nn.Module, config: QuantConfig) -> None:
    quantizer = kv_cache.KVQuantizer(config.kv, config.kv_granularity, config.kv_rotation)
    if config.kv_site == "post_rope":
        attention.kv_quantizer = quantizer  # type: ignore[assignment]
        return
    head_dim: int = attention.head_dim  # type: ignore[assignment]
    for name in ("k_proj", "v_proj"):
        attention.get_submodule(name).register_forward_hook(
            lambda module, inputs, output: quantizer.projection(output, head_dim)
        )
