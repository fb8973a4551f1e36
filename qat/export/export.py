"""Writes a student in one of ``qat.export.formats``, and compares the export with the student."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qat.evaluate.perplexity import perplexity
from qat.export.formats import EXPORT_FORMATS, ExportFormat
from qat.infer import simulated
from qat.quant.number_format import Quantized
from qat.quant.rotated import rotation_of
from qat.runtime.errors import UserError
from qat.runtime.files import writing
from qat.store import weight_files
from qat.store.model_folder import read_config
from qat.store.student_folder import Student

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")


def check(student: Student, format_name: str) -> None:
    """Raise UserError for what the format cannot hold, and for a student that is not complete."""
    if not student.quant.weights.quantizes:
        raise UserError(
            f"{student.path} has w_bits=16, which no format supports, even with overrides: give a student with fewer "
            "bits."
        )
    if not any((student.directory / name).is_file() for name in _TOKENIZERS):
        raise UserError(
            f"{student.directory} has no tokenizer ({', '.join(_TOKENIZERS)}): copy its original model's there."
        )
    check_rotation(student, format_name)
    EXPORT_FORMATS[format_name].check(student)


def check_rotation(student: Student, format_name: str) -> None:
    """Raise UserError for a student that computes more online than the format can state."""
    rotation = rotation_of(read_config(str(student.directory)))
    if rotation and rotation.head_map:
        raise UserError(
            f"{student.path} has a matrix in front of its tied output layer, which no engine supports: make the "
            "student from a model that was rotated with --untie true."
        )
    if rotation and rotation.is_online and not EXPORT_FORMATS[format_name].states_rotation:
        raise UserError(
            f"{student.path} rotates the input of each MLP's last layer (R4), which {format_name} cannot store: make "
            "the student from a model that was rotated with --down none."
        )


def export(student: Student, output: Path, format_name: str, file_bytes: int = weight_files.FILE_BYTES) -> None:
    """Write ``student`` into the folder ``output``, which is empty or new. ``format_name`` is one of EXPORT_FORMATS."""
    with writing(output):
        output.mkdir(parents=True, exist_ok=True)
    EXPORT_FORMATS[format_name].write(student, output, file_bytes)


@dataclass(frozen=True)
class Verified:
    """The result of ``verify``: perplexities on ``tokens`` predicted tokens.

    Args:
        trained: perplexity of the student as training simulated it
        expected: perplexity of the part of it that the format stores; the same if it stores all
        exported: perplexity of the export, read back
        engine: whether the format's engine loads it, as the end of a sentence; see ExportFormat.loaded_by
    """

    trained: float
    expected: float
    exported: float
    tokens: int
    engine: str | None = ""

    def sentence(self, text: str) -> str:
        begins, engine = "Verified: read back", self.engine
        if engine is None:
            begins, engine = "Read back, not verified", "; loading it in its engine timed out"
        sentence = (
            f"{begins}, the export gives the logits of the model in memory, bit for bit{engine}. "
            f"Perplexity on {self.tokens:,} tokens of {text}: {self.trained:.3f} as trained"
        )
        if self.expected != self.trained:
            sentence += f", {self.expected:.3f} without what this format does not hold"
        return f"{sentence}, {self.exported:.3f} read back."


@torch.inference_mode()
def verify(student: Student, exported: Path, format_name: str, windows: Tensor) -> Verified:
    """Read the export back and compare it with the student in memory, on token ids [windows, window].

    Raises UserError unless their logits and perplexities are equal, bit for bit, in fp32. What the format does not hold
    is left out of the student, too. The engine that the format is for must load it, where it is installed.
    """
    kind = EXPORT_FORMATS[format_name]
    model = _in_memory(student)
    trained = expected = perplexity(model, windows)
    if kind.held(student.quant) != student.quant or type(kind).held_weight is not ExportFormat.held_weight:
        del model  # many hosts have no room for two
        model = _in_memory(student, kind)
        expected = perplexity(model, windows)
    logits = model(windows[:1]).logits
    del model
    model = kind.load(exported)
    got = model(windows[:1]).logits
    if not torch.equal(got, logits):
        raise UserError(f"{exported} is wrong: its logits differ by up to {(got - logits).abs().max():.3g}.")
    found = perplexity(model, windows)
    if found.nll != expected.nll:
        raise UserError(f"{exported} is wrong: its perplexity is {found.perplexity}, not {expected.perplexity}.")
    engine = kind.loaded_by(exported)
    return Verified(trained.perplexity, expected.perplexity, found.perplexity, found.tokens, engine)


def _in_memory(student: Student, kind: ExportFormat | None = None) -> PreTrainedModel:
    """Return the student as it was trained, or the part of it that a format holds."""
    weights = (
        (
            name,
            kind.held_weight(weight, student.weight_formats[name.removesuffix(".weight")])
            if kind and isinstance(weight, Quantized)
            else weight,
        )
        for name, weight in student.weights()
    )
    quant = kind.held(student.quant) if kind else student.quant
    given = (student.directory, weights, student.dtype, quant, torch.float32, student.tensor_scales)
    return simulated.simulate(*given, keep_values=False)
