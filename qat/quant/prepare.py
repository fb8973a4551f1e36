"""``prepare`` turns the Linear layers and the attention of a model, and its embedding where that is asked for, into
quantized ones, in place."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import Tensor, nn

from qat.quant import kv_cache, producers
from qat.quant.architecture import (
    architecture_of,
    check_supported,
    decoder_layers,
    head_dim,
    input_embedding,
    linear_in,
    output_layer,
)
from qat.quant.config import QuantConfig, matches
from qat.quant.embedding import QuantEmbedding
from qat.quant.kv_formats.integers import Integers
from qat.quant.layer_settings import attention_settings, layer_settings, vocabulary_settings
from qat.quant.linear import InputQuantizer, QuantLinear, quant_linears
from qat.quant.number_format import Format
from qat.quant.rotated import check_rotates
from qat.quant.tensor_scales import largest_magnitudes, scales_from, set_tensor_scales, tensor_scales
from qat.runtime.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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
        raise UserError("The model is already prepared: load it again to quantize it differently.")
    check_rotates(model)
    _check_cache(model, config)
    _warn_of_idle_settings(model, config)
    architecture, layers = architecture_of(model.config), decoder_layers(model)
    settings, caches = layer_settings(model, config), attention_settings(model, config)
    for number, layer in enumerate(layers):
        for names in architecture.shared_inputs:
            own = [settings[architecture.prefix(number) + name] for name in names]
            _quantize_linears({name: linear_in(layer, name) for name in names}, own)
        if architecture.block:
            producers.join(layer, architecture.block, model.config)
        kv = caches[architecture.prefix(number) + architecture.attention]
        if kv.kv.quantizes:
            _quantize_kv(layer, model, kv)
    if any(own.kv.quantizes for own in caches.values()) and config.kv_site == "post_rope":
        kv_cache.attend(model)
    _quantize_vocabulary(model, config)
    if all(linear.weight.numel() and not linear.weight.is_meta for linear in quant_linears(model).values()):
        set_tensor_scales(model, tensor_scales(model, config, model.named_parameters()))
    setattr(model, _PREPARED, config)
    return model


def prepared_with(model: PreTrainedModel) -> QuantConfig:
    """Return the config that ``prepare`` was given for ``model``; raise UserError if it is not prepared."""
    if not hasattr(model, _PREPARED):
        raise UserError("The model is not quantized: call qat.prepare(model, qat.QuantConfig(...)) first.")
    return getattr(model, _PREPARED)


def weight_holders(model: nn.Module) -> dict[str, list[QuantLinear | QuantEmbedding]]:
    """Return the quantized layers of a prepared model by the name of their weight: one for each, but two where the
    embedding and the output layer are one weight."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    holders: dict[str, list[QuantLinear | QuantEmbedding]] = {}
    for module in model.modules():
        if isinstance(module, QuantLinear | QuantEmbedding):
            holders.setdefault(names[id(module.weight)], []).append(module)
    return holders


def calibrate(student: PreTrainedModel, teacher: PreTrainedModel, input_ids: Tensor) -> None:
    """Set the scales of a prepared student's inputs, keys and values whose formats have any
    (``QuantConfig.measures_scales``), by what the full-precision ``teacher`` computes from input_ids [batch,
    tokens]."""
    config = prepared_with(student)
    largest = largest_magnitudes(teacher, config, lambda: teacher(input_ids))
    set_tensor_scales(student, scales_from(student, config, largest))


def freeze(model: nn.Module, keep_values: bool = True) -> None:
    """Quantize every weight permanently: for evaluation, never for training. Unless ``keep_values``, the values of
    those that are ``read_as_codes`` are freed, each before the next one is quantized: only forward works then."""
    codes_alone = set() if keep_values else read_as_codes(model)
    for name, (first, *others) in weight_holders(model).items():
        quantized = first.freeze()
        for other in others:
            assert quantized is not None
            other.hold(quantized)
        if name in codes_alone:
            free_values([first, *others], first.weight[:0])


def read_as_codes(model: nn.Module) -> set[str]:
    """Return the names of the weights of which inference reads the codes alone: all modules that share one multiply
    codes, or blocks."""
    others = (module for module in model.modules() if not isinstance(module, QuantLinear))
    read_as_values = {id(parameter) for module in others for parameter in module.parameters(recurse=False)}
    return {
        name
        for name, layers in weight_holders(model).items()
        if not {id(layer.weight) for layer in layers} & read_as_values
        and all(layer.multiplies_codes or layer.multiplies_blocks for layer in layers)
    }


def free_values(layers: Iterable[nn.Module], nothing: Tensor) -> None:
    """Put ``nothing``, an empty tensor, in the place of the weight of layers that hold its codes: 8-bit codes beside
    bf16 values would take half as much again as full precision."""
    for layer in layers:
        layer.weight = nn.Parameter(nothing.clone(), requires_grad=False)


def _check_cache(model: PreTrainedModel, config: QuantConfig) -> None:
    for own in attention_settings(model, config).values():
        for form in own.kv_formats if own.kv.quantizes else ():
            form.check(head_dim(model.config))


def _warn_of_idle_settings(model: PreTrainedModel, config: QuantConfig) -> None:
    """Warn about overrides whose patterns match no module that has such settings."""
    architecture, layers = architecture_of(model.config), len(decoder_layers(model))
    linears = [name for names in architecture.shared_inputs for name in names]
    for kind, prefixes, modules in (
        ("linear layer", ("w_", "a_"), linears),
        ("attention", ("kv_",), [architecture.attention]),
    ):
        known = [architecture.names(number, layers, name) for number in range(layers) for name in modules]
        for pattern, changes in config.overrides.items():
            given = [setting for setting in changes if setting.startswith(prefixes)]
            named = pattern in (architecture.embedding, architecture.head)
            if given and not named and not any(matches(pattern, names) for names in known):
                _warn_once(f"overrides: {pattern!r} matches no {kind} of the model, whose {given[0]} it sets")


@functools.cache
def _warn_once(sentence: str) -> None:
    """Log a warning, unless it was logged before: a run prepares its model twice, first without weights."""
    _log.warning("warning: %s", sentence)


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
        _check_blocks("a_quantizer", inputs, linear.in_features)
        _check_groups(own, linear.in_features)
        QuantLinear.convert(linear, own.weights, inputs, shared)


def _quantize_vocabulary(model: PreTrainedModel, config: QuantConfig) -> None:
    head = architecture_of(model.config).head
    for name, own in vocabulary_settings(model, config).items():
        if name == head:
            _quantize_linears({name: output_layer(model)}, [own])
        elif own.weights.quantizes:
            embedding = input_embedding(model)
            _check_groups(own, embedding.embedding_dim)  # type: ignore[arg-type]
            QuantEmbedding.convert(embedding, own.weights)


def _check_groups(own: QuantConfig, channels: int) -> None:
    """Raise UserError for groups that do not divide a layer's input channels."""
    _check_blocks("w_quantizer", own.weights, channels)
    if own.w_group_size and own.weights.quantizes and channels % own.w_group_size:
        raise UserError(
            f"w_group_size={own.w_group_size} does not divide the model's {channels} input channels: "
            "give a divisor of all its layers' widths, say 32 or 64."
        )


def _check_blocks(setting: str, form: Format, channels: int) -> None:
    """Raise UserError if the blocks of a quantizer that has some of its own do not divide ``channels``."""
    block = form.by.group_size
    if form.quantizes and block and channels % block:
        raise UserError(
            f"{setting}={form.quantizer} has blocks of {block}, which do not divide the model's {channels} input "
            "channels: give another quantizer, by overrides for such layers alone."
        )


def _quantize_kv(layer: nn.Module, model: PreTrainedModel, config: QuantConfig) -> None:
    architecture, size = architecture_of(model.config), head_dim(model.config)
    keys, values = config.kv_formats
    if config.kv_site == "post_rope":
        quantizer = kv_cache.KVQuantizer(keys, values, architecture.interleaves)
        layer.get_submodule(architecture.attention).kv_quantizer = quantizer  # type: ignore[assignment]
        return
    if not architecture.key_values:
        raise UserError(
            f"kv_site=pre_rope rounds what the layers for keys and values put out, and {model.config.model_type} has "
            "no such layers: give kv_site=post_rope."
        )
    assert isinstance(keys, Integers)  # QuantConfig has other formats after RoPE alone
    for name in architecture.key_values:
        linear_in(layer, name).register_forward_hook(lambda module, inputs, output: keys.projection(output, size))
