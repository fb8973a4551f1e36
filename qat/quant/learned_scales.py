"""Scales that learn: Parameters for those of weights, and learned steps of activations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from qat.quant.architecture import architecture_of
from qat.quant.linear import QuantLinear, quant_linears
from qat.quant.number_format import grid_of
from qat.quant.quantizers.base import Grid
from qat.runtime.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Trained(NamedTuple):
    """Which Parameters of a student learn."""

    meaning: str
    weights: bool
    scales: bool


TRAINED = {
    "weights": Trained("all weights; the scales of their grids follow from their values at every step", True, False),
    "all": Trained(
        "all weights, and the scales of their grids, initialized from the starting point's (LSQ)", True, True
    ),
    "scales": Trained("only the scales; the codes of the weights stay fixed", False, True),
}
"""What ``TrainConfig.train`` can be. Old runs, which do not record it, trained the weights."""


@torch.no_grad()
def initialise_steps(model: nn.Module, steps: dict[str, Tensor]) -> None:
    """Set the Parameters of learned quantizers, [size] each, by the layer's name."""
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
                f"Values of w_bits={form.bits}, w_quantizer={form.quantizer} in {str(dtype).removeprefix('torch.')}, "
                "the model's dtype, would lose their codes: train in fp32, give w_quantizer=minmax or fewer w_bits, or "
                "train=all."
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
