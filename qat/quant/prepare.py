"""``prepare`` turns the Linear layers and the attention of a model into quantized ones, in place."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qat.quant import kv_cache
from qat.quant.architecture import architecture_of, check_supported, decoder_layers, head_dim, linear_in
from qat.quant.config import QuantConfig
from qat.quant.linear import InputQuantizer, QuantLinear, quant_linears
from qat.runtime.errors import UserError

_PREPARED = "_prepared_with"
"""Attribute of a prepared model: its QuantConfig."""


def prepare(model: PreTrainedModel, config: QuantConfig) -> PreTrainedModel:
    """Quantize ``model`` in place as ``config`` says; with 16-16-16 nothing is touched.

    Raises UserError for an architecture that is not described, or whose KV cache cannot be quantized so, and for a
    model that is prepared already.
    """
    check_supported(model)
    if hasattr(model, _PREPARED):
        raise UserError("The model is prepared already: load it again to quantize it otherwise.")
    _check_cache(model, config)
    for layer in decoder_layers(model):
        if config.weights.quantizes or config.activations.quantizes:
            for names in architecture_of(model.config).shared_inputs:
                _quantize_linears([linear_in(layer, name) for name in names], config)
        if config.kv.quantizes:
            _quantize_kv(layer, model, config)
    if config.kv.quantizes and config.kv_site == "post_rope":
        kv_cache.attend(model)
    setattr(model, _PREPARED, config)
    return model


def prepared_with(model: PreTrainedModel) -> QuantConfig:
    """The config that ``prepare`` was given for ``model``; raises UserError if it is not prepared."""
    if not hasattr(model, _PREPARED):
        raise UserError("The model is not quantized: call qat.prepare(model, qat.QuantConfig(...)) first.")
    return getattr(model, _PREPARED)


@torch.no_grad()
def initialise_steps(model: nn.Module, steps: dict[str, Tensor]) -> None:
    """Set the Parameters of learned quantizers, by the layer's name."""
    for name, linear in quant_linears(model).items():
        if linear.input_step is not None:
            linear.input_step.copy_(steps[name])


def freeze(model: nn.Module) -> None:
    """Quantize every weight once and for all: for evaluation, never for training."""
    for linear in quant_linears(model).values():
        linear.freeze()


def _check_cache(model: PreTrainedModel, config: QuantConfig) -> None:
    size = head_dim(model.config)
    if config.kv_rotation == "hadamard" and size & (size - 1):
        raise UserError(
            f"kv_rotation=hadamard needs a head_dim that is a power of two; this model's is {size}: "
            "give kv_rotation=none."
        )
    if config.kv.quantizes and config.kv_site == "pre_rope" and not architecture_of(model.config).key_values:
        raise UserError(
            f"kv_site=pre_rope rounds what the layers for keys and values put out, and {model.config.model_type} has "
            "no such layers: give kv_site=post_rope."
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


def _quantize_kv(layer: nn.Module, model: PreTrainedModel, config: QuantConfig) -> None:
    quantizer = kv_cache.KVQuantizer(config.kv, config.kv_granularity, config.kv_rotation)
    architecture, size = architecture_of(model.config), head_dim(model.config)
    if config.kv_site == "post_rope":
        layer.get_submodule(architecture.attention).kv_quantizer = quantizer  # type: ignore[assignment]
        return
    for name in architecture.key_values:
        linear_in(layer, name).register_forward_hook(lambda module, inputs, output: quantizer.projection(output, size))
