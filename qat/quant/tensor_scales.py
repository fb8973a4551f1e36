"""Scales of whole tensors, for quantizers that have one: computed from weights, measured on inputs, and set."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qat.quant.architecture import architecture_of, decoder_layers, quantizable_linears
from qat.quant.config import QuantConfig
from qat.quant.layer_settings import layer_settings
from qat.quant.linear import quant_linears
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


@torch.no_grad()
def largest_magnitudes(model: PreTrainedModel, config: QuantConfig, run: Callable[[], object]) -> dict[str, Tensor]:
    """Return the largest magnitude, fp32 [], of each input whose quantizer has a scale of the tensor, while ``run``
    runs the full-precision ``model``; by ``NAME.input``."""
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


def scales_from(model: PreTrainedModel, config: QuantConfig, largest: Mapping[str, Any]) -> dict[str, float]:
    """Return the scales of the inputs of ``model``, whose weights are not read, from ``largest_magnitudes``, with a
    margin for larger values in other text."""
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
