"""``prepare`` turns the Linear layers and the attention of a model into quantized ones, in place."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qat.quant import kv_cache
from qat.quant.architecture import SHARED_INPUTS, check_supported
from qat.quant.config import QuantConfig
from qat.quant.linear import InputQuantizer, QuantLinear, quant_linears
from qat.runtime.errors import UserError

_PREPARED = "_prepared_with"
"""Attribute of a prepared model: its QuantConfig."""


def prepare(model: PreTrainedModel, config: QuantConfig) -> PreTrainedModel:
    """Quantize ``model`` in place as ``config`` says; with 16-16-16 nothing is touched.

    Raises UserError for an architecture whose blocks are not known, a head_dim that cannot be rotated, or a model that
    is prepared already.
    """
    check_supported(model)
    if hasattr(model, _PREPARED):
        raise UserError("The model is prepared already: load it again to quantize it otherwise.")
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
