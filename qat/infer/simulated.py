"""Models for evaluation: they compute what training simulated, with weights rounded once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qat.quant.config import CONFIG_FILE, QuantConfig
from qat.quant.number_format import Quantized, dequantize
from qat.quant.prepare import prepare, weight_holders
from qat.quant.products import speed_up
from qat.quant.rotated import causal_lm_class
from qat.quant.tensor_scales import set_tensor_scales
from qat.runtime.errors import UserError
from qat.store import compressed_tensors, models, student_folder
from qat.store.model_folder import ModelFolder, quantization_of, shapes
from qat.store.sidecars import load_steps

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Weights = Iterator[tuple[str, Tensor | Quantized]]
"""The weights of a complete model, by name, one at a time."""


def load(directory: str, dtype: torch.dtype) -> PreTrainedModel:
    """Load the model at ``directory``, ready for inference: full precision, a student, or an integer export. Full
    precision is on this process's device already, the others are on the CPU.

    Weights are quantized once, here; activations and KV cache as ``quant_config.json`` specifies.
    """
    path = Path(directory)
    if not (path / CONFIG_FILE).is_file():
        model = models.load_here(directory, dtype)
        speed_up(model)
        return model
    quant, trained_dtype, weights = read(path)
    return simulate(path, weights, trained_dtype, quant, dtype, student_folder.scales_of(path, path, quant))


def simulate(
    config: Path,
    weights: Weights,
    trained_dtype: torch.dtype,
    quant: QuantConfig,
    dtype: torch.dtype,
    scales: Mapping[str, float] | None = None,
) -> PreTrainedModel:
    """Build a model that computes in ``dtype`` with ``weights``; activations and KV cache are quantized by ``quant``.

    Args:
        config: folder with config.json, and the learned steps if there are any
        trained_dtype: the dtype in which weights were rounded to their grid: another one rounds differently
        scales: scales of inputs, if their format needs any, see ``Student.tensor_scales``
    """
    values: dict[str, Tensor] = {}
    integers: dict[str, Quantized] = {}
    for name, weight in weights:
        if isinstance(weight, Quantized):
            integers[name] = weight
            weight = dequantize(weight, trained_dtype)
        values[name] = weight.to(dtype)
    settings = ModelFolder.read(config).config
    model = causal_lm_class(settings).from_pretrained(
        None, config=settings, state_dict=values, dtype=dtype, attn_implementation="sdpa"
    )
    holders = weight_holders(prepare(model, quant))
    set_tensor_scales(model, scales or {})
    for name, quantized in integers.items():
        for layer in holders[name]:
            layer.hold(quantized)
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
