"""The base of export formats: each is a file with a subclass of it, and a line in ``EXPORT_FORMATS``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from qat.quant.config import QuantConfig
from qat.quant.number_format import FULL_PRECISION, Format, Quantized
from qat.store import weight_files
from qat.store.model_folder import ModelFolder, write_companions
from qat.store.student_folder import Student

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FAKE, GGUF = "hf-fake", "gguf"
"""The names of formats that the messages of others recommend; FAKE holds every student."""


class ExportFormat(ABC):
    """A way to write a student for other engines. The defaults are those of a format that holds the weights, codes and
    scales as trained, and leaves activations and KV cache in full precision.

    Attributes:
        meaning: what it is and for whom, for ``--help``
        weight_files: the pattern of its weight files' names
        front_matter: lines of the model card's YAML, beside base model and licence
        engine: the engine that can serve it with the trained KV cache, by its name in qat.quant.kv_formats
        runs_as_trained: whether qat.load and launch/chat.py run an export, with the activations and the KV cache that
            were trained
        states_rotation: whether it can state R4, the online rotation in front of the MLP's last layer
    """

    meaning: str
    weight_files: str = "*.safetensors"
    front_matter: tuple[str, ...] = ()
    engine: str = ""
    runs_as_trained: bool = False
    states_rotation: bool = False

    def check(self, student: Student) -> None:  # noqa: B027
        """Raise UserError for what the format, or every engine that reads it, cannot hold."""

    def max_positions(self, student: Student) -> int:
        """Return the longest sequence, in tokens, for which an export computes what the student does."""
        return student.max_positions

    @abstractmethod
    def write(self, student: Student, output: Path, file_bytes: int) -> None:
        """Write the student into the new folder ``output``, in weight files of up to ``file_bytes`` bytes."""

    @abstractmethod
    def load(self, exported: Path) -> PreTrainedModel:
        """Load the export as other engines read it, in fp32, ready for inference. ``verify`` compares its logits with
        those of the part of the student that the format holds, bit for bit."""

    def held(self, quant: QuantConfig) -> QuantConfig:
        """Return the settings that ``load`` follows."""
        return quant.everywhere(a_bits=FULL_PRECISION, kv_bits=FULL_PRECISION)

    def held_weight(self, weight: Quantized, form: Format) -> Quantized | Tensor:
        """Return a weight, quantized by ``form``, as the format holds it; its values, if ``held`` says w_bits=16."""
        return weight

    def loaded_by(self, exported: Path) -> str | None:
        """Try an export in the engine that the format is for; return the result as the end of a sentence; empty if no
        engine is tried, and None if it did not come to an end.

        Raises UserError if it refuses the export.
        """
        return ""

    def deviations(self, quant: QuantConfig) -> list[str]:
        """Return one sentence for each thing that an engine which loads an export does not do as trained."""
        sentences = []
        if quant.a_bits != FULL_PRECISION:
            sentences.append(f"{trained_activations(quant)}; here they stay in full precision.")
        if quant.kv_bits != FULL_PRECISION:
            sentences.append(f"{trained_cache(quant)}; here it stays in full precision.")
        return sentences

    def vocabulary_deviations(self, student: Student) -> list[str]:
        """Return the same for a quantized embedding or output layer; empty if neither is."""
        output = student.output_settings
        if output is None or output.a_bits == FULL_PRECISION:
            return []
        return [f"{trained_output(output)}; here it stays in full precision."]

    def cache_flags(self, quant: QuantConfig) -> str:
        """Return the flags with which the engine stores the KV cache as trained; empty if none do."""
        keys, values = quant.kv_formats
        return keys.flags(values) if self.engine and keys.engine == self.engine and quant.kv.quantizes else ""

    def all_deviations(self, student: Student) -> list[str]:
        """Return the ``deviations`` of the settings of all layers."""
        quant = student.quant
        caches = [own for own in quant.all_settings() if own.kv_formats != quant.kv_formats or own.kv != quant.kv]
        settings = dict.fromkeys([quant, *caches, *student.layer_settings.values()])
        sentences = [sentence for own in settings for sentence in self.deviations(own)]
        return list(dict.fromkeys([*sentences, *self.vocabulary_deviations(student)]))

    @abstractmethod
    def serve(self, name: str) -> list[str]:
        """Return the commands that run an export in the folder ``name``, for the model card."""


def trained_activations(quant: QuantConfig) -> str:
    """Return the beginning of a sentence on quantized activations."""
    return f"Activations: trained with {quant.a_bits} bits {_groups(quant)}"


def _groups(quant: QuantConfig) -> str:
    """Say which activations share a scale."""
    if group := quant.activations.group_size:
        return f"in blocks of {group}"
    return "per tensor" if quant.activations.scales_tensors else "per token"


def trained_output(quant: QuantConfig) -> str:
    """Return the beginning of a sentence on the input of the output layer, whose settings are given."""
    how = f"with {quant.a_bits} bits {_groups(quant)}"
    return f"Output layer: its input was trained {'in full precision' if quant.a_bits == FULL_PRECISION else how}"


def trained_cache(quant: QuantConfig) -> str:
    """Return the beginning of a sentence on a quantized KV cache."""
    if not quant.kv_formats[0].adjustable:
        return f"KV cache: trained as {quant.kv_format}"
    return (
        f"KV cache: trained with {quant.kv_bits} bits ({quant.kv_quantizer}, {quant.kv_site}, {quant.kv_granularity}, "
        f"rotation {quant.kv_rotation})"
    )


def write_folder(
    student: Student, output: Path, tensors: Iterable[tuple[str, Tensor]], file_bytes: int, **changes: Any
) -> None:
    """Write a Hugging Face directory with these tensors and the student's config, with ``changes``, and tokenizer.

    Whatever the size of the model, one weight file and one tensor are in memory at a time.
    """
    weight_files.write(output, tensors, file_bytes)
    dtype = str(student.dtype).removeprefix("torch.")
    write_companions(ModelFolder.read(student.directory).companions(), output, dtype=dtype, **changes)
