"""Files beside a quantized model's weights: learned activation steps (LSQ), weight grids (GPTQ's, learned ones), scales
of tensors (NVFP4)."""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from qat.quant.config import GRIDS_FILE, SCALES_FILE
from qat.quant.linear import quant_linears
from qat.quant.quantizers.base import Grid
from qat.runtime.errors import UserError
from qat.runtime.files import load_tensors, save_tensors

STEPS_FILE = "activation_steps.safetensors"
"""Name of the file beside the weights if activations have learned steps: these are no weights of the architecture."""


STEP_SUFFIX = ".input_step"
CHANGE_SUFFIX = ".scale_change"
"""Ends of the names of the Parameters that are no weights of the architecture, but give a step or a grid."""
_SCALE = "_tensor_scale"


def save_steps(steps: dict[str, Tensor], directory: Path) -> None:
    """Write the learned steps, by their Parameters' names, where there are some."""
    if steps:
        save_tensors(steps, directory / STEPS_FILE)


@torch.no_grad()
def load_steps(model: nn.Module, directory: Path) -> None:
    """Set the learned steps of a prepared model, in fp32: its own dtype might round them. Raise UserError if they are
    missing."""
    linears = {name: linear for name, linear in quant_linears(model).items() if linear.input_step is not None}
    if not linears:
        return
    if not (directory / STEPS_FILE).is_file():
        quantizer = next(iter(linears.values())).input_format.quantizer
        raise UserError(
            f"{directory} is incomplete: a_quantizer={quantizer} has learned steps, and {STEPS_FILE} is missing."
        )
    steps = load_tensors(directory / STEPS_FILE)
    if without := {name + STEP_SUFFIX for name in linears} - steps.keys():
        raise UserError(f"{directory} is incomplete: {STEPS_FILE} lacks {min(without)}. Copy it again.")
    if strange := steps.keys() - {name + STEP_SUFFIX for name in linears}:
        raise UserError(f"{directory / STEPS_FILE} does not fit the model, which has no {min(strange)}. Copy it again.")
    for name, linear in linears.items():
        step = steps[name + STEP_SUFFIX]
        if step.shape != linear.input_step.shape or not step.isfinite().all():  # type: ignore[union-attr]
            raise UserError(
                f"{directory / STEPS_FILE} is damaged: the step of {name} is not finite, or has the wrong shape. Copy "
                "it again."
            )
        linear.input_step.data = step.float().to(linear.input_step.device)  # type: ignore[union-attr]


def learned_grids(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Grid]:
    """Return the learned weight grids of a prepared model, by the layer's name, given all its ``weights``."""
    linears = quant_linears(model).items()
    learned = {name: linear for name, linear in linears if linear.scale_change is not None}
    grids = {name: linear.learned_grid(weights[name + CHANGE_SUFFIX].cpu()) for name, linear in learned.items()}
    return {name: grid for name, grid in grids.items() if grid is not None}


def save_grids(grids: dict[str, Grid], path: Path) -> None:
    """Write the grids of layers, by name, into one file: ``NAME.weight_scale``, and ``NAME.weight_zero_point``."""
    tensors = {f"{name}.weight_{field}": part for name, grid in grids.items() for field, part in grid._asdict().items()}
    save_tensors({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)


def load_grids(directory: Path, file: str = GRIDS_FILE) -> dict[str, Grid]:
    """Load the grids stored beside the weights at ``directory``, by the layer's name; empty if the weights' values give
    them."""
    if not (directory / file).is_file():
        return {}
    stored = load_tensors(directory / file)
    names = [name.removesuffix(".weight_scale") for name in stored if name.endswith(".weight_scale")]
    return {name: Grid(stored[f"{name}.weight_scale"], stored.get(f"{name}.weight_zero_point")) for name in names}


def save_tensor_scales(scales: dict[str, float], directory: Path) -> None:
    """Write the scales of tensors, where there are some, by their names: ``NAME.weight``, ``NAME.input`` of a layer,
    ``NAME.keys``, ``NAME.values`` of an attention."""
    if scales:
        save_tensors({name + _SCALE: torch.tensor([scale]) for name, scale in scales.items()}, directory / SCALES_FILE)


def load_tensor_scales(directory: Path) -> dict[str, float]:
    """Load the scales stored at ``directory``; empty if there are none."""
    if not (directory / SCALES_FILE).is_file():
        return {}
    stored = load_tensors(directory / SCALES_FILE)
    return {name.removesuffix(_SCALE): part.item() if part.numel() == 1 else math.nan for name, part in stored.items()}
