"""Models for evaluation: they compute what training simulated, with weights rounded once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qat.quant.config import CONFIG_FILE, QuantConfig
from qat.quant.number_format import Quantized, dequantize
from qat.quant.prepare import free_values, prepare, read_as_codes, weight_holders
from qat.quant.products import speed_up
from qat.quant.tensor_scales import set_tensor_scales
from qat.runtime import machine
from qat.runtime.errors import UserError
from qat.store import compressed_tensors, models, student_folder
from qat.store.model_folder import ModelFolder, quantization_of, shapes, skeleton
from qat.store.sidecars import load_steps

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Weights = Iterator[tuple[str, Tensor | Quantized]]
"""The weights of a complete model, by name, one at a time."""


def load(directory: str, dtype: torch.dtype, here: bool = False) -> PreTrainedModel:
    """Load the model at ``directory``, ready for inference: full precision, a student, or an integer export.

    Weights are quantized once, here; activations and KV cache as ``quant_config.json`` specifies.

    Args:
        here: on this process's device, and without values where only codes are read; else on the CPU, but for a model
            in full precision
    """
    path = Path(directory)
    if not (path / CONFIG_FILE).is_file():
        model = models.load_here(directory, dtype)
        speed_up(model)
        return model
    quant, trained_dtype, weights = read(path)
    scales = student_folder.scales_of(path, path, quant)
    place = machine.device() if here else torch.device("cpu")
    model = simulate(path, weights, trained_dtype, quant, dtype, scales, keep_values=not here, place=place)
    if here:
        machine.place(model)  # what is no weight
    return model


def simulate(
    config: Path,
    weights: Weights,
    trained_dtype: torch.dtype,
    quant: QuantConfig,
    dtype: torch.dtype,
    scales: Mapping[str, float] | None = None,
    keep_values: bool = True,
    place: torch.device = torch.device("cpu"),  # noqa: B008  # immutable
) -> PreTrainedModel:
    """Build a model that computes in ``dtype`` with ``weights``; activations and KV cache are quantized by ``quant``.

    The weights are read one at a time.

    Args:
        config: folder with config.json, and the learned steps if there are any
        trained_dtype: the dtype in which weights were rounded to their grid: another one rounds differently
        scales: scales of inputs, if their format needs any, see ``Student.tensor_scales``
        keep_values: keep the values of weights of which inference reads the codes alone
        place: where the weights go
    """
    model = prepare(skeleton(config), quant)
    set_tensor_scales(model, scales or {})
    holders, values = weight_holders(model), dict[str, Tensor]()
    codes_alone = set() if keep_values else read_as_codes(model)
    for name, weight in weights:
        if isinstance(weight, Quantized):
            weight = Quantized(weight.codes.to(place), weight.grid.map(lambda part: part.to(place)))
            for layer in holders[name]:
                layer.hold(weight)
            if name in codes_alone:
                free_values(holders[name], torch.empty(0, dtype=dtype, device=place))
                continue
            weight = dequantize(weight, trained_dtype)
        values[name] = weight.to(place, dtype)
    model.load_state_dict(values, strict=False, assign=True)
    model.tie_weights()
    models.renew_rope(model)
    load_steps(model, config)
    speed_up(model)
    return model.eval()


def read(path: Path) -> tuple[QuantConfig, torch.dtype, Weights]:
    """Return how a student's Hugging Face directory or an integer export is quantized, the dtype that was trained, and
    its weights, one at a time."""
    config = _quantization_config(path)
    if config is None:
        student = student_folder.find(path)
        return student.quant, student.dtype, student.weights()
    folder = ModelFolder.read(path)
    return QuantConfig.load(path), folder.dtype, _decoded(folder, config)


def _decoded(folder: ModelFolder, config: dict[str, Any]) -> Weights:
    """Yield the weights of an export; raise UserError for one whose stored shape is not the model's."""
    expected = shapes(folder.skeleton())
    for name, weight in compressed_tensors.decode(folder.tensors(), config):
        shape = weight.codes.shape if isinstance(weight, Quantized) else weight.shape
        if shape != expected[name]:
            raise UserError(f"{folder.directory} is damaged: {name} says that it is {list(shape)}. Copy it again.")
        yield name, weight


def _quantization_config(path: Path) -> dict[str, Any] | None:
    """Return the ``quantization_config`` of an export's config.json; None for a student."""
    config = quantization_of(path) if (path / "config.json").is_file() else None
    if config is None:
        return None
    if config.get("format") not in compressed_tensors.LAYOUTS:
        raise UserError(f"{path} is quantized in the format {config.get('format')!r}, which is not one of ours.")
    return config
