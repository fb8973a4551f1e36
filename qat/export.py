"""Exports: a student as a directory that inference engines load.

``pack-quantized`` and ``int-quantized`` are integer checkpoints in compressed-tensors layouts (see qat.formats),
``hf-fake`` has the rounded weights as floats for tools that know nothing of quantization, ``gguf`` is one file for
llama.cpp (see qat.llama_cpp). ``quant_config.json`` beside an integer checkpoint keeps what its format has no words
for: the KV cache, and the true number of bits.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from qat import formats, llama_cpp, loading, weight_files
from qat.errors import UserError
from qat.evaluate import perplexity
from qat.files import load_tensors, save_tensors, writing
from qat.formats import INTEGERS, PACKED
from qat.loading import load
from qat.model_folder import ModelFolder, write_companions
from qat.prepare import STEPS_FILE, QuantConfig
from qat.quantizers import FULL_PRECISION, Quantized, dequantize
from qat.source import Student

FAKE, GGUF = "hf-fake", "gguf"
FORMATS = (PACKED, INTEGERS, FAKE, GGUF)
FORMAT = PACKED
"""The default."""

_RUNS = {
    None: "",
    True: ", and llama.cpp loads it",
    False: "; whether llama.cpp loads it is not known, as xllamacpp is not installed",
}

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")


def check(student: Student, form: str) -> None:
    """Raise UserError for what the format cannot hold, and for a student that is not complete."""
    if not student.quant.weights.quantizes:
        raise UserError(f"{student.path} has w_bits=16: there are no quantized weights to export.")
    if not any((student.directory / name).is_file() for name in _TOKENIZERS):
        raise UserError(
            f"{student.directory} has no tokenizer ({', '.join(_TOKENIZERS)}): copy that of the model it began with "
            "there."
        )
    if form == GGUF:
        llama_cpp.check(student)
    elif form != FAKE:
        formats.check(student.quant, form)


def longest(student: Student, form: str) -> int:
    """The longest sequence for which an export in the format is the student."""
    return llama_cpp.positions(AutoConfig.from_pretrained(student.directory)) if form == GGUF else student.longest


def export(student: Student, output: Path, form: str, file_bytes: int = weight_files.FILE_BYTES) -> None:
    """Write ``student`` in the format ``form`` (one of FORMATS) into the folder ``output``, which is empty or new.

    Whatever the size of the model, one weight file and one tensor are in memory at a time.
    """
    with writing(output):
        output.mkdir(parents=True, exist_ok=True)
    if form == GGUF:
        llama_cpp.write(student, output)
        return
    weight_files.write(output, _stored(student, form), file_bytes)
    changes: dict[str, Any] = {"dtype": str(student.dtype).removeprefix("torch.")}
    if form != FAKE:  # which would be quantized again
        changes["quantization_config"] = formats.quantization_config(student.quant, form)
        student.quant.save(output)
        if student.quant.activations.learned:
            save_tensors(load_tensors(student.directory / STEPS_FILE), output / STEPS_FILE)
    write_companions(ModelFolder.read(student.directory).companions(), output, **changes)


def _stored(student: Student, form: str) -> Iterator[tuple[str, Tensor]]:
    for name, weight in student.progress():
        if not isinstance(weight, Quantized):
            yield name, weight
        elif form == FAKE:
            yield name, dequantize(weight, student.dtype)
        else:
            yield from formats.encode(name.removesuffix(".weight"), weight, student.quant, form).items()


@dataclass(frozen=True)
class Verified:
    """What ``verify`` found: perplexities on ``tokens`` predicted tokens.

    Args:
        trained: of the student, as training simulated it
        expected: of what the format holds of it; the same for integer checkpoints
        exported: of the export, read back
        runs: whether llama.cpp itself has loaded it; None for other formats
    """

    trained: float
    expected: float
    exported: float
    tokens: int
    runs: bool | None = None

    def sentence(self, text: str) -> str:
        said = (
            f"Verified: read back, the export gives the logits of the model in memory, bit for bit{_RUNS[self.runs]}. "
            f"Perplexity on {self.tokens:,} tokens of {text}: {self.trained:.3f} as trained"
        )
        if self.expected != self.trained:
            said += f", {self.expected:.3f} without what this format does not hold"
        return f"{said}, {self.exported:.3f} read back."


@torch.inference_mode()
def verify(student: Student, exported: Path, form: str, windows: Tensor) -> Verified:
    """Read the export back and compare it with the student in memory, on token ids [windows, window].

    Raises UserError unless their logits and perplexities are equal, bit for bit, in fp32. What a format does not hold
    (hf-fake and gguf: activations and KV cache; gguf: more of a scale than fp16) is left out of the student, too. A
    GGUF file must also be one that llama.cpp loads, where xllamacpp is installed.
    """
    model = _in_memory(student, student.quant)
    trained = expected = perplexity(model, windows)
    if form in (FAKE, GGUF):
        bare = replace(student.quant, a_bits=FULL_PRECISION, kv_bits=FULL_PRECISION)
        model = _in_memory(student, bare, llama_cpp.held if form == GGUF else None)
        expected = perplexity(model, windows)
    logits = model(windows[:1]).logits
    del model
    model = llama_cpp.load(exported) if form == GGUF else load(str(exported), torch.float32)
    got = model(windows[:1]).logits
    if not torch.equal(got, logits):
        raise UserError(f"{exported} is wrong: its logits differ by up to {(got - logits).abs().max():.3g}.")
    found = perplexity(model, windows)
    if found.nll != expected.nll:
        raise UserError(f"{exported} is wrong: its perplexity is {found.perplexity}, not {expected.perplexity}.")
    runs = llama_cpp.is_loaded(exported) if form == GGUF else None
    return Verified(trained.perplexity, expected.perplexity, found.perplexity, found.tokens, runs)


def _in_memory(
    student: Student, quant: QuantConfig, change: Callable[[Quantized], Quantized] | None = None
) -> PreTrainedModel:
    weights = (
        (name, change(weight) if change and isinstance(weight, Quantized) else weight)
        for name, weight in student.weights()
    )
    return loading.simulate(student.directory, weights, student.dtype, quant, torch.float32)
