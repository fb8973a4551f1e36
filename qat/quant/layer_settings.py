"""The settings of each layer: what the overrides make of a QuantConfig."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qat.quant.architecture import architecture_of, decoder_layers, is_tied
from qat.quant.config import QuantConfig
from qat.runtime.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def layer_settings(model: PreTrainedModel, config: QuantConfig) -> dict[str, QuantConfig]:
    """Return the settings, with overrides, of each Linear layer of the decoder that ``prepare`` quantizes, by its
    name."""
    architecture, layers = architecture_of(model.config), len(decoder_layers(model))
    return {
        architecture.prefix(number) + name: config.of_layer(architecture.names(number, layers, name))
        for number in range(layers)
        for names in architecture.shared_inputs
        for name in names
    }


def attention_settings(model: PreTrainedModel, config: QuantConfig) -> dict[str, QuantConfig]:
    """Return the settings, with overrides, of each layer's attention, which keeps the KV cache, by its name."""
    architecture, layers = architecture_of(model.config), len(decoder_layers(model))
    names = [architecture.names(number, layers, architecture.attention) for number in range(layers)]
    return {own[0]: config.of_layer(own) for own in names}


def vocabulary_settings(model: PreTrainedModel, config: QuantConfig) -> dict[str, QuantConfig]:
    """Return the settings of the layers with a row for each token, the embedding and the output layer, by name; only of
    those that are quantized.

    Where both are one weight, the format that overrides give to either is both's. Raises UserError for settings that
    such a layer does not have, and for two formats of one weight.
    """
    embedding, head = architecture_of(model.config).embedding, architecture_of(model.config).head
    parts: dict[str, tuple[str, ...]] = {embedding: ("w_",), head: ("w_", "a_")}
    given = {name: config.overrides[name] for name in parts if name in config.overrides}
    for name, changes in given.items():
        if strange := [setting for setting in changes if not setting.startswith(parts[name])]:
            raise UserError(f"overrides: {strange[0]} does not apply to {name}: leave it out there.")
        if changes.keys().isdisjoint(("w_bits", "a_bits")):
            raise UserError(
                f"overrides: without w_bits{' or a_bits' if name == head else ''} {name} is not quantized: set it, too."
            )
    if not given:
        return {}
    own = {name: config.of_vocabulary(name) for name in parts}
    for name, one in own.items():
        if any(form.quantizes and form.by.is_float for form in (one.weights, one.activations)):
            raise UserError(
                f"overrides: {name} supports integer quantizers only: give it the quantizer minmax, or 16 bits."
            )
    if own[head].activations.learned:
        raise UserError(f"overrides: the input of {head} cannot have a learned step: leave out its a_bits.")
    if is_tied(model):
        formats = {own[name].weights: own[name] for name, changes in given.items() if _sets_weights(changes)}
        if len(formats) > 1:
            raise UserError(
                f"overrides: {embedding} and {head} of this model are one weight, which cannot have two formats: give "
                "both the same w_bits, w_quantizer, w_group_size and w_scale_dtype, or give them to one of the two."
            )
        for shared in formats.values():
            own = {name: settings.with_weights_of(shared) for name, settings in own.items()}
    return {name: one for name, one in own.items() if one.weights.quantizes or one.activations.quantizes}


def _sets_weights(changes: Mapping[str, Any]) -> bool:
    return any(setting.startswith("w_") for setting in changes)
