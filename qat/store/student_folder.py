"""Students on disk: written, found, and read one tensor at a time.

A student is a Hugging Face directory with ``quant_config.json`` beside its weights (the ``final/`` of a run, or the
output of launch/quantize.py), or one of a run's ZeRO-3 checkpoints, of any number of ranks.
"""

from __future__ import annotations

import contextlib
import logging
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qat.quant.architecture import architecture_of, is_tied, quantizable_linears
from qat.quant.config import CONFIG_FILE, QuantConfig
from qat.quant.layer_settings import attention_settings, layer_settings, vocabulary_settings
from qat.quant.learned_scales import TRAINED
from qat.quant.linear import quant_linears
from qat.quant.number_format import FULL_PRECISION, Format, Quantized, dequantize, quantize
from qat.quant.prepare import prepared_with
from qat.quant.quantizers.base import Grid
from qat.quant.rotated import rotation_of
from qat.quant.tensor_scales import measured, tensor_scales, tensor_scales_in
from qat.runtime import progress
from qat.runtime.errors import UserError
from qat.runtime.files import appearing_folder, read_json, read_lines, using
from qat.store import manifest, models, weight_files
from qat.store.model_folder import (
    BASE_MODEL,
    PTQ_RECORD,
    STUDENT,
    ModelFolder,
    TensorSpec,
    check_complete,
    check_finite,
    head_weight,
    quantization_of,
    read_config,
    shapes,
    skeleton,
    tensor_specs,
    write_companions,
)
from qat.store.pickles import as_data
from qat.store.run_folder import LATEST, LOG, SETTINGS, STUDENT_PREFIX
from qat.store.sidecars import (
    CHANGE_SUFFIX,
    GRIDS_FILE,
    SCALES_FILE,
    STEP_SUFFIX,
    learned_grids,
    load_grids,
    load_tensor_scales,
    save_grids,
    save_steps,
    save_tensor_scales,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ZERO_FILES = "zero_pp_rank_*_model_states.pt"
_log = logging.getLogger(__name__)


def save(model: PreTrainedModel, directory: str | Path, source: str | Path) -> None:
    """Write a prepared model, trained in a loop of your own, as launch/train.py writes the ``final/`` of a run.

    ``qat.load`` and the commands read it. Its weights are not yet rounded; ``quant_config.json`` specifies how.

    Args:
        directory: a new folder, which appears complete or not at all
        source: the model that it was made from, whose config and tokenizer it takes over: its folder, or hub name
    """
    if Path(directory).exists():
        raise UserError(f"{directory} exists already: choose another folder.")
    quant, folder = prepared_with(model), ModelFolder.read(Path(models.resolve(str(source))))
    if not all(parameter.numel() for parameter in model.parameters()):
        raise UserError("The model was frozen without its values: freeze it with keep_values, or save it before.")
    if rotation_of(folder.config) != rotation_of(model.config):
        raise UserError(f"{source} is rotated differently from the model: give the one that the model was made from.")
    write(Path(directory), model, model.state_dict(), quant, folder.companions())


def write(
    directory: Path,
    model: PreTrainedModel,
    weights: Mapping[str, Tensor],
    quant: QuantConfig,
    companions: Mapping[str, bytes],
) -> None:
    """Write ``weights`` of ``model`` (learned steps among them) as a student, in the dtype that it computes in.

    The directory appears complete or not at all.

    Args:
        companions: ModelFolder.companions of the model that the student began with
    """
    names = [name for name in shapes(model) if not name.endswith((STEP_SUFFIX, CHANGE_SUFFIX))]
    with appearing_folder(directory) as partial:
        grids = learned_grids(model, weights)
        weight_files.write(partial, ((name, _as_stored(name, weights[name], model, grids)) for name in names))
        changes = {"dtype": str(model.dtype).removeprefix("torch."), STUDENT: CONFIG_FILE}
        write_companions(companions, partial, **changes)
        if grids:
            save_grids(grids, partial / GRIDS_FILE)
        save_tensor_scales(tensor_scales_in(model), partial)
        quant.save(partial)
        save_steps({name: weight for name, weight in weights.items() if name.endswith(STEP_SUFFIX)}, partial)


def _as_stored(name: str, weight: Tensor, model: PreTrainedModel, grids: Mapping[str, Grid]) -> Tensor:
    """Return a weight as it is written: rounded, where its codes stayed and only its grid has learned; else as it is.

    Raises UserError if its values would lose their codes.
    """
    layer, weight = name.removesuffix(".weight"), weight.cpu()
    if layer not in grids or not (linear := quant_linears(model)[layer]).keeps_codes:
        return weight
    codes, grid = linear.quantized(weight, grids[layer])
    values = dequantize(Quantized(codes, grid), weight.dtype)
    if not torch.equal(quantize(values, linear.weight_format, grid).codes, codes):
        raise UserError(
            f"Values of w_bits={linear.weight_format.bits}, w_quantizer={linear.weight_format.quantizer} in "
            f"{weight.dtype}, the model's dtype, lose their codes: train in fp32, or with fewer w_bits."
        )
    return values


@dataclass(frozen=True)
class Student:
    """A trained, or post-training quantized, model on disk.

    Args:
        path: folder of its weights
        directory: the Hugging Face directory that has its config and tokenizer
        quant: its quantization
        dtype: dtype of the weights when they are rounded to their grid, in training as in evaluation
        run: content of the training run's ``settings.json``; empty if there is none
    """

    path: Path
    directory: Path
    quant: QuantConfig
    dtype: torch.dtype
    run: dict[str, Any]

    @property
    def is_checkpoint(self) -> bool:
        """Return whether its weights are those of a ZeRO-3 checkpoint."""
        return self.path != self.directory

    @property
    def base_model(self) -> str:
        """Return the name of the model that it was made from, as it was then; empty if that is not recorded."""
        return self.run.get("model") or self._ptq_record.get(BASE_MODEL, "")

    @property
    def max_positions(self) -> int:
        """Return the number of positions that the model can attend over."""
        return read_config(str(self.directory)).max_position_embeddings

    @property
    def ptq_method(self) -> str:
        """Return the method of launch/quantize.py that made it; empty for a trained student."""
        return self._ptq_record.get("method", "")

    @property
    def has_grids(self) -> bool:
        """Return whether its weights lie on grids that are stored beside them, and must not be missing."""
        # quant_config.json states that, and was read; those of earlier versions do not, when only GPTQ had grids.
        return (self.path / GRIDS_FILE).is_file() or self.ptq_method == "gptq"

    @property
    def _ptq_record(self) -> dict[str, Any]:
        file = self.path / PTQ_RECORD
        return read_json(file) if file.is_file() else {}

    def grids(self) -> dict[str, Grid]:
        """Return the grids that are stored beside the weights, by the layer's name; empty if their values give them.

        Raises UserError if one is missing, or does not fit the model.
        """
        model = skeleton(self.directory)
        forms = {layer: own.weights for layer, own in self.layer_settings.items() if own.weights.quantizes}
        quantized = {name: linear for name, linear in quantizable_linears(model).items() if name in forms}
        grids = load_grids(self.path)
        if self.has_grids and (without := quantized.keys() - grids.keys()):
            raise UserError(f"{self.path} is incomplete: {GRIDS_FILE} lacks {min(without)}. Copy it again.")
        for layer, grid in grids.items():
            if layer not in quantized or not _fits(grid, quantized[layer], forms[layer]):
                raise UserError(f"{self.path / GRIDS_FILE} does not fit the model, in {layer}. Copy it again.")
        return grids

    def weights(self) -> Iterator[tuple[str, Tensor | Quantized]]:
        """Yield name and tensor of each weight, one at a time; quantized ones as codes and grid.

        Raises UserError if they are not those of the config, or not finite.
        """
        folder = ModelFolder.read(self.directory)
        model = folder.skeleton()
        grids, forms = self.grids(), self.weight_formats
        for name, tensor in _gathered(self.path, model, self.dtype) if self.is_checkpoint else folder.tensors():
            layer = name.removesuffix(".weight")
            yield name, quantize(tensor, forms[layer], grids.get(layer)) if layer in forms else tensor

    @cached_property
    def layer_settings(self) -> dict[str, QuantConfig]:
        """Return the settings, with overrides, of each Linear layer of the decoder, by its name."""
        return layer_settings(skeleton(self.directory), self.quant)

    @cached_property
    def attention_settings(self) -> dict[str, QuantConfig]:
        """Return the settings, with overrides, of each layer's attention, by its name."""
        return attention_settings(skeleton(self.directory), self.quant)

    @cached_property
    def vocabulary_settings(self) -> dict[str, QuantConfig]:
        """Return the settings of the embedding and the output layer, by name, where they are quantized."""
        return vocabulary_settings(skeleton(self.directory), self.quant)

    @property
    def output_settings(self) -> QuantConfig | None:
        """Return the settings of the output layer; None if it is not quantized."""
        return self.vocabulary_settings.get(architecture_of(read_config(str(self.directory))).head)

    @cached_property
    def is_tied(self) -> bool:
        """Return whether the embedding and the output layer are one weight."""
        return is_tied(skeleton(self.directory))

    @property
    def settings(self) -> dict[str, QuantConfig]:
        """Return the settings of all layers that may be quantized, by name."""
        return self.layer_settings | self.vocabulary_settings

    @cached_property
    def tensor_scales(self) -> dict[str, float]:
        """Return the scales of tensors whose format has one, by ``NAME.weight``, ``NAME.input``, ``NAME.keys`` and
        ``NAME.values``."""
        return scales_of(self.path.parent.parent if self.is_checkpoint else self.path, self.directory, self.quant)

    @cached_property
    def weight_formats(self) -> dict[str, Format]:
        """Return the format of each quantized weight, by the layer's name."""
        forms = {layer: own.weights for layer, own in self.settings.items() if own.weights.quantizes}
        return {
            layer: replace(form, tensor_scale=self.tensor_scales.get(f"{layer}.weight"))
            for layer, form in forms.items()
        }

    def progress(self) -> Iterator[tuple[str, Tensor | Quantized]]:
        """Yield ``weights``, with a progress bar."""
        count = sum(1 for _ in skeleton(self.directory).parameters())
        yield from progress.bar(self.weights(), desc="export", total=count, unit="tensor")

    def last_step(self) -> dict[str, Any] | None:
        """Return the record in the run's log of the step that these weights are from; None if there is none."""
        run = self.path.parent.parent if self.is_checkpoint else self.path.parent
        step = int("".join(re.findall(r"\d+", self.path.name)[:1]) or 0) if self.is_checkpoint else None
        records = read_lines(run / LOG) if (run / LOG).is_file() else []
        return next((record for record in reversed(records) if step in (None, record["step"])), None)


def find(path: Path, model: str | None = None) -> Student:
    """Find the student at ``path``. Raises UserError, which lists what would be one, if there is none.

    Args:
        path: a Hugging Face directory with quant_config.json, a run's checkpoints/step-N, or its checkpoints/ for
            the latest
        model: the model that the run began with, for the config and tokenizer of a checkpoint; by default where the
            run found it
    """
    if (path / LATEST).is_file():
        path = path / (path / LATEST).read_text().strip()
    if any(path.glob(_ZERO_FILES)):
        return _of_checkpoint(path, model)
    if not (path / CONFIG_FILE).is_file():
        raise UserError(
            f"{path} is not a student: give the final/ or a checkpoints/step-N of a training run, or the "
            "output of launch/quantize.py."
        )
    directory = Path(models.resolve(str(path)))
    if quantization_of(directory):
        raise UserError(f"{path} is an export: give the student that it was made from.")
    return Student(
        path, directory, QuantConfig.load(path), ModelFolder.read(directory).dtype, run_settings(path.parent)
    )


def full_precision(directory: str) -> Student:
    """Return the full-precision model in a Hugging Face directory, as a student of which nothing is quantized."""
    path, bits = Path(directory), FULL_PRECISION
    return Student(path, path, QuantConfig(bits, bits, bits), ModelFolder.read(path).dtype, {})


def _of_checkpoint(path: Path, model: str | None) -> Student:
    run = run_settings(path.parent.parent)
    if not run:
        raise UserError(f"{path} is a checkpoint without its run: {path.parent.parent / SETTINGS} is missing.")
    record = path.parent.parent / SETTINGS
    began_with = model or run.get("student") or run.get("model")
    if not began_with:
        raise UserError(f"{path} does not record its starting model: give it with --model.")
    directory = models.resolve(began_with)
    settings = run["settings"]
    with using(record):
        expected = settings["student"] if "student" in run else settings["model"]
        quant = QuantConfig.of(QuantConfig.among(settings), record)
        in_bf16 = (settings.get("bf16") or {}).get("enabled", False)
        learned = TRAINED[settings.get("train", "weights")].scales
    if models.weights_fingerprint(directory) != expected:
        raise UserError(f"{began_with} is not the starting model of the run of {path}: give that with --model.")
    if quant.activations.learned:
        raise UserError(
            f"a_quantizer={quant.a_quantizer}: {path} is a checkpoint, but learned steps are read only from a run's "
            "final/: give that."
        )
    if learned:
        raise UserError(f"{path} is a checkpoint, but learned scales are read only from a run's final/: give that.")
    _log.info("checking %s ...", path)
    if damage := manifest.damage(path):
        raise UserError(
            f"The checkpoint {path} is damaged or incomplete: {damage}. Give another one of the run, or its final/."
        )
    return Student(path, Path(directory), quant, torch.bfloat16 if in_bf16 else torch.float32, run)


def _fits(grid: Grid, linear: nn.Module, form: Format) -> bool:
    """Return whether ``grid`` fits the weight of ``linear``."""
    rows, columns = linear.out_features, linear.in_features
    shape = (rows, columns // form.group_size if form.group_size else 1)  # type: ignore[operator]
    parts = [part for part in grid if part is not None]
    whole = len(parts) == (1 if form.symmetric else 2) and all(part.shape == shape for part in parts)
    return whole and all(bool(part.isfinite().all()) for part in parts)


def scales_of(stored: Path, model: Path, quant: QuantConfig) -> dict[str, float]:
    """Return the scales of weights, inputs, keys and values, by their names: those in the folder ``stored``, or else
    those that the weights of the model in the folder ``model`` give. Raises UserError if they do not fit it."""
    empty = skeleton(model)
    weights = {name: own.weights for name, own in layer_settings(empty, quant).items()}
    expected = {f"{layer}.weight" for layer, form in weights.items() if form.scales_tensors}
    expected |= measured(empty, quant).keys()
    scales = load_tensor_scales(stored) or weight_scales(model, quant)
    if without := expected - scales.keys():
        raise UserError(f"{stored} is incomplete: {SCALES_FILE} lacks {min(without)}. Copy it again.")
    if scales.keys() != expected or not all(0 < scale < float("inf") for scale in scales.values()):
        raise UserError(f"{stored / SCALES_FILE} does not fit the model. Copy it again.")
    return scales


def weight_scales(directory: Path, quant: QuantConfig) -> dict[str, float]:
    """Return the scales that the weights in the folder of a model give them, by name, for formats that have a scale of
    the tensor; empty for others."""
    model = skeleton(directory)
    settings = layer_settings(model, quant)
    scaled = {f"{layer}.weight" for layer, own in settings.items() if own.weights.scales_tensors}
    return tensor_scales(model, quant, ModelFolder.read(directory).tensors(scaled.__contains__)) if scaled else {}


def run_settings(run: Path) -> dict[str, Any]:
    """Return the content of a training run's settings.json; empty if there is none."""
    path = run / SETTINGS
    if not path.is_file():
        return {}
    content = read_json(path)
    with using(path):
        dict(content["settings"])
    return content


def _gathered(checkpoint: Path, model: PreTrainedModel, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of a ZeRO-3 checkpoint of ``model``, put together from all ranks' files, which stay on disk.

    The checkpoint keeps fp32 master weights; the student computes with these rounded to ``dtype``.
    """
    from deepspeed.utils import zero_to_fp32  # slow to import, rarely needed

    zero_to_fp32.tqdm = progress.bar  # its own would fill a log file
    try:
        with contextlib.redirect_stdout(sys.stderr), as_data(checkpoint):
            parts = zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint(
                str(checkpoint.parent), checkpoint.name, lazy_mode=True
            )
        own = {name.removeprefix(STUDENT_PREFIX): part for name, part in parts.items()}
        if model.config.tie_word_embeddings:
            own.pop(head_weight(model.config), None)
        check_complete(
            {name: TensorSpec(torch.Size(part.shape)) for name, part in own.items()}, tensor_specs(model), checkpoint
        )
        for name, part in own.items():
            tensor = part.contiguous().to(dtype)
            check_finite(name, tensor, checkpoint)
            yield name, tensor
    except UserError:
        raise
    except (ValueError, RuntimeError, OSError, EOFError, KeyError) as error:
        raise UserError(f"The checkpoint {checkpoint} is damaged or incomplete: {error}") from error
