"""``gguf``: one file for llama.cpp; see qat.store.gguf_files."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qat.export.formats.base import FAKE, ExportFormat, trained_activations, trained_cache, trained_output
from qat.quant.config import QuantConfig
from qat.quant.number_format import FULL_PRECISION, Format, Quantized
from qat.runtime.errors import UserError
from qat.store import gguf_files
from qat.store.student_folder import Student

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Gguf(ExportFormat):
    meaning = "one file, for llama.cpp"
    weight_files = "*.gguf"
    engine = "llama.cpp"

    def check(self, student: Student) -> None:
        with _advising():
            gguf_files.check(student)

    def max_positions(self, student: Student) -> int:
        from transformers import AutoConfig

        return gguf_files.max_positions(AutoConfig.from_pretrained(student.directory))

    def write(self, student: Student, output: Path, file_bytes: int) -> None:
        """Write one file, whatever its size."""
        with _advising():
            gguf_files.write(student, output)

    def load(self, exported: Path) -> PreTrainedModel:
        return gguf_files.load(exported)

    def held(self, quant: QuantConfig) -> QuantConfig:
        """Return full precision: of the weights, ``held_weight`` gives the values."""
        return replace(super().held(quant), w_bits=FULL_PRECISION, overrides={})

    def held_weight(self, weight: Quantized, form: Format) -> Tensor:
        return gguf_files.held(weight, form)

    def loaded_by(self, exported: Path) -> str | None:
        if not gguf_files.is_installed():
            return "; not tried in llama.cpp (xllamacpp is not installed)"
        with _advising():
            return ", and llama.cpp loads it" if gguf_files.is_loaded(exported) else None

    def deviations(self, quant: QuantConfig) -> list[str]:
        sentences = [_activations(quant)]
        if quant.weights.by.is_float:
            sentences.append("Weights: as trained. Only recent versions of llama.cpp run these types.")
        elif not quant.weights.symmetric:
            sentences.append("Weights: codes are as trained; scale and minimum of each group are rounded to fp16.")
        elif quant.weights.by.scale_dtype != torch.float16:
            sentences.append(
                "Weights: codes are as trained; each scale is rounded to fp16, by at most 1 part in 2048, or 3e-8."
            )
        if flags := self.cache_flags(quant):
            sentences.append(
                f"{trained_cache(quant)}. llama.cpp stores it like this, in all layers, with {flags}; without, it "
                "keeps fp16."
            )
        elif quant.kv_bits != FULL_PRECISION:
            sentences.append(
                f"{trained_cache(quant)}; llama.cpp keeps fp16 unless told otherwise (its q4_0 and q8_0 have blocks of "
                "32)."
            )
        return sentences

    def vocabulary_deviations(self, student: Student) -> list[str]:
        output = student.output_settings
        if output is None or not output.weights.quantizes:
            return super().vocabulary_deviations(student)
        if output.a_bits != FULL_PRECISION and output.activations.by.rounds_as_llama_cpp:
            return []
        return [f"{trained_output(output)}; llama.cpp rounds it to 8 bits in blocks of 32."]

    def serve(self, name: str) -> list[str]:
        return [f"llama-cli -m {name}/{gguf_files.FILE}"]


@contextlib.contextmanager
def _advising() -> Iterator[None]:
    """Add the export format that holds every student to the message of Unsupported."""
    try:
        yield
    except gguf_files.Unsupported as error:
        raise UserError(f"{error} Give --format {FAKE}.") from error


def _activations(quant: QuantConfig) -> str:
    blocks = "llama.cpp rounds them to 8 bits in blocks of 32"
    if quant.a_bits == FULL_PRECISION:
        return f"Activations: {blocks}."
    if quant.activations.by.rounds_as_llama_cpp:
        return "Activations: as trained on CPUs with AVX; elsewhere llama.cpp's rule differs in the last bits."
    finer = "" if quant.activations.group_size else ", finer than one scale per token"
    return f"{trained_activations(quant)}; {blocks}{finer}."
