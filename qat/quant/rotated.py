"""Rotated models: what remains to be computed online after rotations were folded into the weights.

    R1  residual stream   x R1            folded into everything that reads or writes it
    R2  values, per head  v R2            folded into the layers for values and attention's output
    R3  queries and keys                  ``kv_rotation``, see qat.quant.kv_cache
    R4  the MLP's inner activation        a fast Hadamard transform in front of ``down``, online; its inverse is folded

A model with R1, R2 and an output layer of its own is an ordinary model of its architecture. R4, and with tied
embeddings the map that stands for the final norm's weight and R1 in front of the output layer, are modules and hooks of
``causal_lm_class``, as the ``rotation`` of the model's config.json says. Names as in SpinQuant (Liu et al. 2024, arXiv
2405.16406); QuaRot (Ashkboos et al. 2024, arXiv 2404.00456).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from qat.quant.architecture import Block, Smoothed, architecture_of, decoder_layers, linear_in
from qat.quant.hadamard import block_size, largest_power_of_two, transform
from qat.runtime.errors import UserError
from qat.runtime.table import check_choices, choice

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

RECORD = "rotation"
"""The entry of ``config.json`` that says how a model was rotated, and what it computes online."""

_HEAD_MAP = "head_map"

DOWN = {
    "hadamard": "the whole width, where a Hadamard matrix of its size is known; else as blocks",
    "blocks": "blocks of the largest power of two that divides the width, for which engines have kernels",
    "none": "no rotation there",
}


@dataclass(frozen=True)
class Rotation:
    """The rotation of a model, recorded in its config.json.

    Args:
        down: R4, the online Hadamard transform of the input of the MLP's last layer
        head_map: whether final hidden states are multiplied by a matrix in front of the tied output layer
    """

    down: str = choice("hadamard", lambda: DOWN)
    head_map: bool = False

    def __post_init__(self) -> None:
        check_choices(self)

    @property
    def is_online(self) -> bool:
        """Return whether the model computes more than its architecture."""
        return self.head_map or self.down != "none"

    def __str__(self) -> str:
        """Return what is computed online, for messages."""
        parts = ["R4"] * (self.down != "none") + ["a map in front of the tied output layer"] * self.head_map
        return " and ".join(parts) or "nothing"

    def block(self, size: int) -> int:
        """Return the size of the blocks that R4 rotates, of a width ``size``; 0 without R4."""
        return {"hadamard": block_size(size), "blocks": largest_power_of_two(size), "none": 0}[self.down]

    def record(self) -> dict[str, Any]:
        """Return the content of the entry in ``config.json``."""
        return asdict(self)


def rotation_of(config: PreTrainedConfig) -> Rotation | None:
    """Return how the model of a config was rotated; None if it was not."""
    found = getattr(config, RECORD, None)
    if found is None:
        return None
    try:
        return Rotation(**found)
    except TypeError as error:
        raise UserError(
            f"config.json has {RECORD}={found!r}, which this version does not support: update this program."
        ) from error


def llama_block(config: PreTrainedConfig) -> Block:
    """Return the names of a model's modules; raise UserError if it does not compute LLaMA's formula."""
    block = architecture_of(config).block
    if block is None:
        raise UserError(
            f"Rotations need LLaMA-style layers, which {config.model_type} does not have: give a model whose "
            "Architecture has a block."
        )
    return block


def check_plain(config: PreTrainedConfig, engine: str) -> None:
    """Raise UserError for a model with online rotations: ``engine`` computes the architecture alone."""
    if (rotation := rotation_of(config)) and rotation.is_online:
        raise UserError(
            f"The model was rotated and computes rotations online ({rotation}), which {engine} does not support: "
            "give the model that it was made from, or rotate that with --down none --untie true."
        )


def smoothed(config: PreTrainedConfig) -> tuple[Smoothed, ...]:
    """Return the tensors that SmoothQuant can scale: not the one that R4 rotates."""
    architecture, rotation = architecture_of(config), rotation_of(config)
    if rotation is None or rotation.down == "none":
        return architecture.smoothed
    return tuple(group for group in architecture.smoothed if llama_block(config).down not in group.readers)


def head_map_weight(config: PreTrainedConfig) -> str:
    """Return the name of the weight of the map in front of the output layer."""
    return f"{architecture_of(config).norm}.{_HEAD_MAP}.weight"


def check_rotates(model: PreTrainedModel) -> None:
    """Raise UserError for a model whose config asks for online rotations, and which was loaded without them."""
    rotation = rotation_of(model.config)
    if rotation and rotation.is_online and not isinstance(model, Rotated):
        raise UserError(
            "The model was rotated, and transformers has loaded it without its online rotations: load it with "
            "qat.store.models.load(folder, dtype)."
        )


def online_widths(model: PreTrainedModel) -> dict[str, tuple[int, int]]:
    """Return, for each layer in front of which R4 rotates, by its name, the width of its input and of R4's blocks."""
    rotation = rotation_of(model.config)
    if rotation is None or rotation.down == "none":
        return {}
    architecture, down = architecture_of(model.config), llama_block(model.config).down
    widths = {
        architecture.prefix(number) + down: linear_in(layer, down).in_features
        for number, layer in enumerate(decoder_layers(model))
    }
    return {name: (width, rotation.block(width)) for name, width in widths.items()}


class Rotated:
    """Mixed into a model's class by ``causal_lm_class``: the model has the online parts of its rotation."""


def causal_lm_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Return the class of the model that ``config`` describes: transformers', or a subclass with its online
    rotations."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    plain: type[PreTrainedModel] = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]  # type: ignore[assignment]
    rotation = rotation_of(config)
    return _rotated(plain) if rotation and rotation.is_online else plain  # type: ignore[arg-type]  # mypy: hashable?


@cache
def _rotated(plain: type[PreTrainedModel]) -> type[PreTrainedModel]:
    def init(self: PreTrainedModel, config: PreTrainedConfig, *arguments: Any, **more: Any) -> None:
        plain.__init__(self, config, *arguments, **more)
        _attach(self)

    return type(plain.__name__, (Rotated, plain), {"__init__": init, "__module__": plain.__module__})


def _attach(model: PreTrainedModel) -> None:
    """Add what ``model`` computes online."""
    architecture, rotation = architecture_of(model.config), rotation_of(model.config)
    assert rotation is not None
    for name, (_, block) in online_widths(model).items():
        linear_in(model, name).register_forward_pre_hook(_Transform(block))
    if rotation.head_map:
        norm = model.get_submodule(architecture.norm)
        size = model.config.hidden_size
        norm.add_module(_HEAD_MAP, nn.Linear(size, size, bias=False))
        norm.register_forward_hook(_mapped)


def _mapped(norm: nn.Module, _: tuple[Tensor, ...], normed: Tensor) -> Tensor:
    return norm.get_submodule(_HEAD_MAP)(normed)


@dataclass(frozen=True)
class _Transform:
    """A hook that rotates a layer's input in blocks of this size."""

    block: int

    def __call__(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (transform(inputs[0], self.block), *inputs[1:])
