"""Scales of whole tensors, for formats that have one: computed from weights, measured on inputs, keys and values, and
set."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qat.quant.architecture import architecture_of, attentions, decoder_layers, quantizable_linears
from qat.quant.config import QuantConfig
from qat.quant.kv_cache import KVRecorder, attend, kv_quantizers
from qat.quant.kv_formats import KVFormat
from qat.quant.layer_settings import attention_settings, layer_settings
from qat.quant.linear import quant_linears
from qat.quant.number_format import Format
from qat.quant.quantizers.base import Quantizer
from qat.runtime.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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


def measured(model: PreTrainedModel, config: QuantConfig) -> dict[str, Quantizer | KVFormat]:
    """Return what has a scale that is measured: inputs, by ``NAME.input`` of their layer, and keys and values, by
    ``NAME.keys`` and ``NAME.values`` of their attention."""
    inputs = {f"{name}.input": own.activations for name, own in layer_settings(model, config).items()}
    found: dict[str, Quantizer | KVFormat] = {name: form.by for name, form in inputs.items() if form.scales_tensors}
    for name, own in attention_settings(model, config).items():
        found |= {f"{name}.{part}": form for part, form in own.scaled_kv_formats.items()}
    return found


@torch.no_grad()
def largest_magnitudes(model: PreTrainedModel, config: QuantConfig, run: Callable[[], object]) -> dict[str, Tensor]:
    """Return the largest magnitude, fp32 [], of each of ``measured``, by name, while ``run`` runs the full-precision
    ``model``."""
    wanted = measured(model, config)
    found: dict[str, Tensor] = {}

    def note(owner: str, part: str, x: Tensor) -> None:
        if (name := f"{owner}.{part}") in wanted:
            found[name] = torch.maximum(x.abs().amax().float(), found.get(name, torch.zeros((), device=x.device)))

    hooks, caches = [], attention_settings(model, config)
    recorded = {name: module for name, module in attentions(model).items() if caches[name].scaled_kv_formats}
    for name, linear in quantizable_linears(model).items():
        hooks.append(linear.register_forward_pre_hook(lambda _, x, own=name: note(own, "input", x[0])))
    if recorded:
        attend(model)
    for name, module in recorded.items():
        formats, interleaves = caches[name].kv_formats, architecture_of(model.config).interleaves
        module.kv_quantizer = KVRecorder(*formats, interleaves, partial(note, name))  # type: ignore[assignment]
    run()
    for hook in hooks:
        hook.remove()
    for module in recorded.values():
        del module.kv_quantizer
    return found


def scales_from(model: PreTrainedModel, config: QuantConfig, largest: Mapping[str, Any]) -> dict[str, float]:
    """Return the scales of what is ``measured`` in ``model``, whose weights are not read, from ``largest_magnitudes``,
    with a margin for larger values in other text."""
    by = measured(model, config)
    return {
        name: by[name].scale_of_tensor(by[name].margin * _finite(name, float(value))) for name, value in largest.items()
    }


def _finite(name: str, largest: float) -> float:
    if not math.isfinite(largest):
        raise UserError(
            f"{name} has the value {largest}, for which no scale can be fixed before training: repair the model, or "
            "give that layer a format without such a scale (quantizer fp8, mxfp4, minmax; kv_format int)."
        )
    return largest


def set_tensor_scales(model: nn.Module, scales: Mapping[str, float]) -> None:
    """Set the scales of weights, inputs, keys and values, by their names in ``model``, where these are quantized;
    ``prepare`` sets those of weights that it has."""
    linears, caches = quant_linears(model), kv_quantizers(model)
    for name, scale in scales.items():
        layer, _, part = name.rpartition(".")
        if (cache := caches.get(layer)) is not None:
            setattr(cache, part, getattr(cache, part).for_tensor(scale))
        linear = linears.get(layer)
        if linear is None:
            continue
        if part == "weight":
            linear.weight_format = replace(linear.weight_format, tensor_scale=scale)
        elif linear.input_quantizer is not None:
            linear.input_format = linear.input_quantizer.form = replace(linear.input_format, tensor_scale=scale)


def tensor_scales_in(model: nn.Module) -> dict[str, float]:
    """Return the scales that were set, by name."""
    forms: dict[str, Format | KVFormat] = {}
    for name, linear in quant_linears(model).items():
        forms |= {f"{name}.weight": linear.weight_format, f"{name}.input": linear.input_format}
    for name, cache in kv_quantizers(model).items():
        forms |= {f"{name}.keys": cache.keys, f"{name}.values": cache.values}
    return {name: form.tensor_scale for name, form in forms.items() if form.tensor_scale is not None}
