"""``prepare`` turns the Linear layers and the attention of a model, and its embedding where that is asked for, into
quantized ones, in place."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qat.quant import kv_cache
from qat.quant.architecture import (
    architecture_of,
    check_supported,
    decoder_layers,
    head_dim,
    input_embedding,
    is_tied,
    linear_in,
    output_layer,
    quantizable_linears,
)
from qat.quant.config import QuantConfig, matches
from qat.quant.embedding import QuantEmbedding
from qat.quant.kv_formats.integers import Integers
from qat.quant.linear import InputQuantizer, QuantLinear, quant_linears
from qat.quant.number_format import Format, grid_of
from qat.quant.quantizers.base import Grid
from qat.quant.rotated import check_rotates
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


def weight_holders(model: nn.Module) -> dict[str, list[QuantLinear | QuantEmbedding]]:
    """Return the quantized layers of a prepared model by the name of their weight: one for each, but two where the
    embedding and the output layer are one weight."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    holders: dict[str, list[QuantLinear | QuantEmbedding]] = {}
    for module in model.modules():
        if isinstance(module, QuantLinear | QuantEmbedding):
            holders.setdefault(names[id(module.weight)], []).append(module)
    return holders


@torch.no_grad()
def initialise_steps(model: nn.Module, steps: dict[str, Tensor]) -> None:
    """Set the Parameters of learned quantizers, by the layer's name."""
    for name, linear in quant_linears(model).items():
        if linear.input_step is not None:
            linear.input_step.copy_(steps[name])


@torch.no_grad()
def learn_scales(model: PreTrainedModel, grids: Mapping[str, Grid] | None = None) -> None:
    """Make the scales of the quantized weights Parameters (LSQ, arXiv 1902.08153), before an optimizer is made.

    Args:
        grids: initial grids, by the layer's name; by default those that the weights' own values give
    """
    check_scales_can_learn(model)
    for name, linear in scales_that_learn(model).items():
        linear.learn_scale(grids[name] if grids else grid_of(linear.weight, linear.weight_format))


def scales_that_learn(model: PreTrainedModel) -> dict[str, QuantLinear]:
    """Return the layers whose scales can learn, by name: those of the blocks. A quantized output layer, which may be
    the embedding too, keeps the grid that its values give."""
    head = architecture_of(model.config).head
    return {
        name: linear for name, linear in quant_linears(model).items() if linear.weight_format.quantizes and name != head
    }


def check_scales_can_learn(model: PreTrainedModel) -> None:
    """Raise UserError if a prepared model has no quantized weights, or some whose scales cannot be Parameters."""
    forms = [linear.weight_format for linear in scales_that_learn(model).values()]
    if not forms:
        raise UserError("w_bits=16: there are no scales of weights to learn. Give fewer bits, or train=weights.")
    for form in forms:
        if not form.by.scale_can_learn:
            raise UserError(
                f"w_quantizer={form.quantizer}, w_scale_dtype={form.scale_dtype}: only scales of integers in fp32 can "
                "learn. Give minmax and float32, or train=weights."
            )


def check_codes_last(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Raise UserError if values of a prepared model, rounded to ``dtype``, may lose the codes that stay where nothing
    but scales learns: they are stored as values."""
    for linear in scales_that_learn(model).values():
        form = linear.weight_format
        lowest, highest = form.code_range
        most = max(-lowest, highest) if form.symmetric else highest - lowest  # steps from zero to a value
        if most * torch.finfo(dtype).eps > 1:
            raise UserError(
                f"Values of {form} in {str(dtype).removeprefix('torch.')}, the model's dtype, would lose their codes: "
                "train in fp32, give w_quantizer=minmax or fewer w_bits, or train=all."
            )


def train_only_scales(model: nn.Module) -> None:
    """Leave a gradient to nothing but the scales: those of ``learn_scales``, and learned steps of activations.

    The codes of the weights stay (PEQA, arXiv 2305.14152; the second phase of EfficientQAT, arXiv 2407.11062).
    """
    model.requires_grad_(False)
    for linear in quant_linears(model).values():
        linear.keeps_codes = linear.scale_change is not None
        for parameter in (linear.input_step, linear.scale_change):
            if parameter is not None:
                parameter.requires_grad_(True)


def tensor_scales(
    model: PreTrainedModel, config: QuantConfig, weights: Iterable[tuple[str, Tensor]]
) -> dict[str, float]:
    """Compute the scale of each of the given ``weights`` whose quantizer has one, by its name; ``model`` need have
    none. Layers that read one tensor share it: engines fuse them, and read only one."""
    forms = {f"{name}.weight": own.weights for name, own in layer_settings(model, config).items()}
    forms = {name: form for name, form in forms.items() if form.scales_tensors}
    largest = {name: _finite(name, weight.abs().max().item()) for name, weight in weights if name in forms}
    architecture, scales = architecture_of(model.config), {}
    for number in range(len(decoder_layers(model))):
        for names in architecture.shared_inputs:
            fused = [own for name in names if (own := f"{architecture.prefix(number)}{name}.weight") in largest]
            for own in fused:
                scales[own] = forms[own].by.scale_of_tensor(max(largest[one] for one in fused))
    return scales


@torch.no_grad()
def largest_inputs(model: PreTrainedModel, config: QuantConfig, run: Callable[[], object]) -> dict[str, Tensor]:
    """Return the largest magnitude, fp32, of each input whose quantizer has a scale of the tensor, while ``run`` runs
    the full-precision ``model``; by ``NAME.input``."""
    found: dict[str, Tensor] = {}

    def note(name: str, x: Tensor) -> None:
        found[name] = torch.maximum(x.abs().amax().float(), found.get(name, torch.zeros((), device=x.device)))

    settings, hooks = layer_settings(model, config), []
    for name, linear in quantizable_linears(model).items():
        if settings[name].activations.scales_tensors:
            hooks.append(linear.register_forward_pre_hook(lambda _, x, own=f"{name}.input": note(own, x[0])))
    run()
    for hook in hooks:
        hook.remove()
    return found


def input_scales(model: PreTrainedModel, config: QuantConfig, largest: Mapping[str, Any]) -> dict[str, float]:
    """Return the scales of the inputs of ``model``, whose weights are not read, from the given ``largest_inputs``, with
    a margin for larger values in other text."""
    by = {f"{name}.input": own.activations.by for name, own in layer_settings(model, config).items()}
    return {
        name: by[name].scale_of_tensor(by[name].margin * _finite(name, float(value))) for name, value in largest.items()
    }


def _finite(name: str, largest: float) -> float:
    if not math.isfinite(largest):
        raise UserError(
            f"{name} has the value {largest}, for which no scale can be fixed before training: repair the model, or "
            "give that layer a quantizer without such a scale (fp8, mxfp4, minmax)."
        )
    return largest


def calibrate(student: PreTrainedModel, teacher: PreTrainedModel, input_ids: Tensor) -> None:
    """Set the scales of a prepared student's inputs, for a quantizer that has any (``QuantConfig.scales_inputs``), by
    those that the full-precision ``teacher`` has for input_ids [batch, tokens]."""
    config = prepared_with(student)
    largest = largest_inputs(teacher, config, lambda: teacher(input_ids))
    set_tensor_scales(student, input_scales(student, config, largest))


def set_tensor_scales(model: nn.Module, scales: Mapping[str, float]) -> None:
    """Set the scales of weights and inputs, by their names in ``model``, where these are quantized; ``prepare`` sets
    those of weights that it has."""
    linears = quant_linears(model)
    for name, scale in scales.items():
        layer, _, part = name.rpartition(".")
        linear = linears.get(layer)
        if linear is None:
            continue
        if part == "weight":
            linear.weight_format = replace(linear.weight_format, tensor_scale=scale)
        elif linear.input_quantizer is not None:
            linear.input_format = linear.input_quantizer.form = replace(linear.input_format, tensor_scale=scale)


def tensor_scales_in(model: nn.Module) -> dict[str, float]:
    """Return the scales that were set, by name."""
    forms = {f"{name}.weight": linear.weight_format for name, linear in quant_linears(model).items()}
    forms |= {f"{name}.input": linear.input_format for name, linear in quant_linears(model).items()}
    return {name: form.tensor_scale for name, form in forms.items() if form.tensor_scale is not None}


def freeze(model: nn.Module) -> None:
    """Quantize every weight permanently: for evaluation, never for training."""
    for first, *others in weight_holders(model).values():
        quantized = first.freeze()
        for other in others:
            assert quantized is not None
            other.hold(quantized)


def _check_cache(model: PreTrainedModel, config: QuantConfig) -> None:
    architecture, layers = architecture_of(model.config), len(decoder_layers(model))
    for number in range(layers):
        own = config.of_layer(architecture.names(number, layers, architecture.attention))
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
        quantizer = kv_cache.KVQuantizer(keys, values, keys.reorders and architecture.interleaves)
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
