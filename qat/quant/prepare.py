"""``prepare`` turns the Linear layers and the attention of a model into quantized ones, in place."""

import logging

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qat.quant import kv_cache
from qat.quant.architecture import architecture_of, check_supported, decoder_layers, head_dim, linear_in
from qat.quant.config import QuantConfig, matches
from qat.quant.linear import InputQuantizer, QuantLinear, quant_linears
from qat.quant.rotated import check_rotates
from qat.runtime.errors import UserError

_log = logging.getLogger(__name__)

_PREPARED = "_prepared_with"
"""Name of the attribute that holds a prepared model's QuantConfig."""


def prepare(model: PreTrainedModel, config: QuantConfig) -> PreTrainedModel:
    """Quantize ``model`` in place as ``config`` specifies; with 16-16-16 nothing is changed.

    Raises UserError for an architecture that is not described, or whose KV cache cannot be quantized this way, and for
    a model that is prepared already.
    """
    check_supported(model)
    if hasattr(model, _PREPARED):
        raise UserError("The model is prepared already: load it again to quantize it otherwise.")
    check_rotates(model)
    _check_cache(model, config)
    _warn_of_idle_patterns(model, config)
    architecture, layers = architecture_of(model.config), decoder_layers(model)
    settings, cached = layer_settings(model, config), False
    for number, layer in enumerate(layers):
        for names in architecture.shared_inputs:
            own = [settings[architecture.prefix(number) + name] for name in names]
            _quantize_linears({name: linear_in(layer, name) for name in names}, own)
        kv = config.of_layer(architecture.names(number, len(layers), architecture.attention))
        if kv.kv.quantizes:
            _quantize_kv(layer, model, kv)
            cached = True
    if cached and config.kv_site == "post_rope":
        kv_cache.attend(model)
    setattr(model, _PREPARED, config)
    return model


def prepared_with(model: PreTrainedModel) -> QuantConfig:
    """Return the config that ``prepare`` was given for ``model``; raise UserError if it is not prepared."""
    if not hasattr(model, _PREPARED):
        raise UserError("The model is not quantized: call qat.prepare(model, qat.QuantConfig(...)) first.")
    return getattr(model, _PREPARED)


def layer_settings(model: PreTrainedModel, config: QuantConfig) -> dict[str, QuantConfig]:
    """Return the settings, with overrides, of each Linear layer that ``prepare`` quantizes, by its name."""
    architecture, layers = architecture_of(model.config), len(decoder_layers(model))
    return {
        architecture.prefix(number) + name: config.of_layer(architecture.names(number, layers, name))
        for number in range(layers)
        for names in architecture.shared_inputs
        for name in names
    }


@torch.no_grad()
def initialise_steps(model: nn.Module, steps: dict[str, Tensor]) -> None:
    """Set the Parameters of learned quantizers, by the layer's name."""
    for name, linear in quant_linears(model).items():
        if linear.input_step is not None:
            linear.input_step.copy_(steps[name])


def freeze(model: nn.Module) -> None:
    """Quantize every weight permanently: for evaluation, never for training."""
    for linear in quant_linears(model).values():
        linear.freeze()


def _check_cache(model: PreTrainedModel, config: QuantConfig) -> None:
    size = head_dim(model.config)
    if config.kv_rotation == "hadamard" and size & (size - 1):
        raise UserError(
            f"kv_rotation=hadamard needs a head_dim that is a power of two; this model's is {size}: "
            "give kv_rotation=none."
        )


def _warn_of_idle_patterns(model: PreTrainedModel, config: QuantConfig) -> None:
    """Warn about overrides that match nothing."""
    architecture, layers = architecture_of(model.config), len(decoder_layers(model))
    modules = [architecture.attention, *(name for names in architecture.shared_inputs for name in names)]
    known = [architecture.names(number, layers, name) for number in range(layers) for name in modules]
    for pattern in config.overrides:
        if not any(matches(pattern, names) for names in known):
            _log.warning("warning: overrides: %r matches no layer of the model", pattern)


def _quantize_linears(linears: dict[str, nn.Linear], settings: list[QuantConfig]) -> None:
    """Convert layers that read one tensor, each with its settings."""
    inputs = settings[0].activations
    if any(one.activations != inputs for one in settings):
        raise UserError(
            f"overrides: {', '.join(linears)} read one tensor, which is quantized once: give all of them the same "
            "a_bits and a_quantizer."
        )
    shared = InputQuantizer(inputs, readers=len(linears)) if inputs.quantizes and not inputs.learned else None
    for linear, own in zip(linears.values(), settings, strict=True):
        if not own.weights.quantizes and not inputs.quantizes:
            continue
        if (group := own.weights.group_size) and linear.in_features % group:
            raise UserError(
                f"w_group_size={group} does not divide the model's {linear.in_features} input channels: "
                "give a divisor of all its layers' widths, say 32 or 64."
            )
        QuantLinear.convert(linear, own.weights, inputs, shared)


def _quantize_kv(layer: nn.Module, model: PreTrainedModel, config: QuantConfig) -> None:
    quantizer = kv_cache.KVQuantizer(config.kv, config.kv_granularity, config.kv_rotation)
    architecture, size = architecture_of(model.config), head_dim(model.config)
    if config.kv_site == "post_rope":
        layer.get_submodule(architecture.attention).kv_quantizer = quantizer  # type: ignore[assignment]
        return
    if not architecture.key_values:
        raise UserError(
            f"kv_site=pre_rope rounds what the layers for keys and values put out, and {model.config.model_type} has "
            "no such layers: give kv_site=post_rope."
        )
    for name in architecture.key_values:
        linear_in(layer, name).register_forward_hook(lambda module, inputs, output: quantizer.projection(output, size))
