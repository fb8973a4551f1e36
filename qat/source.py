"""What an export is made from: a student's weights, wherever they lie, one tensor at a time.

A student is a Hugging Face directory with ``quant_config.json`` beside its weights (the ``final/`` of a run, or what
launch/quantize.py writes), or one of a run's ZeRO-3 checkpoints, of any number of ranks.
"""

import contextlib
import json
import logging
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qat import manifest, models, progress
from qat.errors import UserError
from qat.files import read_lines
from qat.model_folder import (
    HEAD,
    PTQ_RECORD,
    Kind,
    ModelFolder,
    check_complete,
    check_finite,
    kinds,
    quantization_of,
    read_config,
    skeleton,
)
from qat.pickles import as_data
from qat.prepare import CONFIG_FILE, GRIDS_FILE, QuantConfig, load_grids, quantizable_linears
from qat.quantizers import Quantized, quantize

_RUN_SETTINGS = "settings.json"
_LOG = "log.jsonl"
_LATEST = "latest"
_ZERO_FILES = "zero_pp_rank_*_model_states.pt"
_STUDENT_PREFIX = "student."
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Student:
    """A trained, or post-training quantized, model on disk.

    Args:
        path: where its weights are
        directory: the Hugging Face directory that has its config and tokenizer
        quant: how it is quantized
        dtype: of the weights that are rounded to their grid, in training as in evaluation
        run: what the training run's ``settings.json`` holds; empty if there is none
    """

    path: Path
    directory: Path
    quant: QuantConfig
    dtype: torch.dtype
    run: dict[str, Any]

    @property
    def is_checkpoint(self) -> bool:
        return self.path != self.directory

    @property
    def base_model(self) -> str:
        """The model that the run began with, as it was named then; empty if that is not recorded."""
        return self.run.get("model", "")

    @property
    def longest(self) -> int:
        """The positions that the model can attend over."""
        return read_config(str(self.directory)).max_position_embeddings

    @property
    def ptq_method(self) -> str:
        """The method of launch/quantize.py that made it; empty for a trained student."""
        file = self.path / PTQ_RECORD
        return json.loads(file.read_text()).get("method", "") if file.is_file() else ""

    def weights(self) -> Iterator[tuple[str, Tensor | Quantized]]:
        """Name and tensor of each weight, one at a time; those that are quantized as codes and grid.

        Raises UserError if they are not those of the config, or not finite.
        """
        folder = ModelFolder.read(self.directory)
        model = folder.skeleton()
        form = self.quant.weights
        quantized = quantizable_linears(model) if form.quantizes else {}
        grids = load_grids(self.path)
        if (grids or self.ptq_method == "gptq") and (without := quantized.keys() - grids.keys()):
            raise UserError(f"{self.path} is incomplete: {GRIDS_FILE} lacks {min(without)}. Copy it again.")
        for name, tensor in _gathered(self.path, model, self.dtype) if self.is_checkpoint else folder.tensors():
            layer = name.removesuffix(".weight")
            yield name, quantize(tensor, form, grids.get(layer)) if layer in quantized else tensor

    def progress(self) -> Iterator[tuple[str, Tensor | Quantized]]:
        """``weights``, with a bar that shows how far it is."""
        count = sum(1 for _ in skeleton(self.directory).parameters())
        yield from progress.bar(self.weights(), desc="export", total=count, unit="tensor")

    def last_step(self) -> dict[str, Any] | None:
        """What the run's log says of the step that these weights are from."""
        run = self.path.parent.parent if self.is_checkpoint else self.path.parent
        step = int("".join(re.findall(r"\d+", self.path.name)[:1]) or 0) if self.is_checkpoint else None
        records = read_lines(run / _LOG) if (run / _LOG).is_file() else []
        return next((record for record in reversed(records) if step in (None, record["step"])), None)


def find(path: Path, model: str | None = None) -> Student:
    """The student at ``path``. Raises UserError, which says what would be one, if none is there.

    Args:
        path: a Hugging Face directory with quant_config.json, a run's checkpoints/step-N, or its checkpoints/ for
            the latest
        model: the model that the run began with, for the config and tokenizer of a checkpoint; by default where the
            run found it
    """
    if (path / _LATEST).is_file():
        path = path / (path / _LATEST).read_text().strip()
    if any(path.glob(_ZERO_FILES)):
        return _of_checkpoint(path, model)
    if not (path / CONFIG_FILE).is_file():
        raise UserError(
            f"{path} holds no student: give the final/ or a checkpoints/step-N of a training run, or what "
            "launch/quantize.py wrote."
        )
    directory = Path(models.resolve(str(path)))
    if quantization_of(directory):
        raise UserError(f"{path} is an export already: give the student that it was made from.")
    return Student(path, directory, read_quant(path), ModelFolder.read(directory).dtype, _run_settings(path.parent))


def read_quant(directory: Path) -> QuantConfig:
    """``quant_config.json``; raises UserError if it cannot be read."""
    try:
        return QuantConfig.load(directory)
    except UserError:
        raise
    except (ValueError, TypeError) as error:
        raise UserError(f"{directory / CONFIG_FILE} is damaged ({error}): copy it again, or write it anew.") from error


def _of_checkpoint(path: Path, model: str | None) -> Student:
    run = _run_settings(path.parent.parent)
    if not run:
        raise UserError(f"{path} is a checkpoint without its run: {path.parent.parent / _RUN_SETTINGS} is missing.")
    began_with = model or run.get("model")
    if not began_with:
        raise UserError(f"{path} does not say which model it began with: give it with --model.")
    directory = models.resolve(began_with)
    settings = run["settings"]
    if models.weights_fingerprint(directory) != settings["model"]:
        raise UserError(f"{began_with} is not the model that the run of {path} began with: give that with --model.")
    quant = QuantConfig(**{name: settings[name] for name in QuantConfig.__dataclass_fields__})
    if quant.activations.learned:
        raise UserError(f"a_quantizer=lsq: the learned steps are read from the final/ of a run, not from {path}.")
    _log.info("checking %s ...", path)
    if damage := manifest.damage(path):
        raise UserError(
            f"The checkpoint {path} is damaged or incomplete: {damage}. Give another one of the run, or its final/."
        )
    in_bf16 = (settings.get("bf16") or {}).get("enabled", False)
    return Student(path, Path(directory), quant, torch.bfloat16 if in_bf16 else torch.float32, run)


def _run_settings(run: Path) -> dict[str, Any]:
    path = run / _RUN_SETTINGS
    return json.loads(path.read_text()) if path.is_file() else {}


def _gathered(checkpoint: Path, model: PreTrainedModel, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """The weights of a ZeRO-3 checkpoint of ``model``, put together from all ranks' files, which stay on disk.

    The checkpoint keeps fp32 master weights; what the student computes with is their rounding to ``dtype``.
    """
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint  # slow to import, seldom needed

    try:
        with contextlib.redirect_stdout(sys.stderr), as_data(checkpoint):
            parts = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint.parent), checkpoint.name, lazy_mode=True)
        own = {name.removeprefix(_STUDENT_PREFIX): part for name, part in parts.items()}
        if model.config.tie_word_embeddings:
            own.pop(HEAD, None)
        check_complete({name: Kind(torch.Size(part.shape)) for name, part in own.items()}, kinds(model), checkpoint)
        for name, part in own.items():
            tensor = part.contiguous().to(dtype)
            check_finite(name, tensor, checkpoint)
            yield name, tensor
    except UserError:
        raise
    except (ValueError, RuntimeError, OSError, EOFError, KeyError) as error:
        raise UserError(f"The checkpoint {checkpoint} is damaged or incomplete: {error}") from error
