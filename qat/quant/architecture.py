"""Supported architectures: which Linear layers of a decoder block are quantized, and which of them share an input."""

from torch import nn
from transformers import PreTrainedModel

from qat.runtime.errors import UserError

SUPPORTED_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")


SHARED_INPUTS = (
    ("self_attn", ("q_proj", "k_proj", "v_proj")),
    ("self_attn", ("o_proj",)),
    ("mlp", ("gate_proj", "up_proj")),
    ("mlp", ("down_proj",)),
)
"""The Linear layers of a decoder block, grouped by the tensor that they read."""


def quantizable_linears(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The layers of a model that ``prepare`` quantizes, by name."""
    names = [
        f"model.layers.{number}.{block_name}.{name}"
        for number in range(len(model.base_model.layers))  # type: ignore[arg-type]
        for block_name, layer_names in SHARED_INPUTS
        for name in layer_names
    ]
    return {name: model.get_submodule(name) for name in names}


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
