"""The README.md of an export: where it comes from, how it was made, what was measured, how to serve it."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qat.export.formats import EXPORT_FORMATS
from qat.export.formats.base import ExportFormat
from qat.quant.architecture import architecture_of
from qat.quant.config import QuantConfig
from qat.runtime.errors import UserError
from qat.runtime.files import MANIFEST, read_json, utf8, writing
from qat.store import smollm2
from qat.store.model_folder import read_config
from qat.store.student_folder import Student
from qat.train.losses import LOSSES

_IN_PYTHON = """```python
import qat
from transformers import AutoTokenizer

model, tokenizer = qat.load("{name}"), AutoTokenizer.from_pretrained("{name}")
prompt = tokenizer("Hello", return_tensors="pt").to(model.device)
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=20)[0]))
```"""

_TRAINING = ("loss", "steps", "lr", "warmup_steps", "batch_size", "seed")


@dataclass(frozen=True)
class Origin:
    """Facts for the model card that only the person who exports knows.

    Args:
        base_model: the hub's name of the model that the student began with; empty if it is not known
        license: its licence, which is that of the export
        results: JSON files written by launch/evaluate.py
    """

    base_model: str
    license: str
    results: list[Path] = field(default_factory=list)


_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_EMBEDDED = Origin("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0")


def write(student: Student, format_name: str, origin: Origin, checks: str, output: Path) -> None:
    """Write ``output/README.md``; ``checks`` describes what was verified."""
    head = [f"base_model: {origin.base_model}"] if origin.base_model else []
    head += [f"license: {origin.license}"] if origin.license else []
    kind, quant = EXPORT_FORMATS[format_name], student.quant
    head += kind.front_matter
    base = origin.base_model or Path(student.base_model).name or "a model that is not recorded"
    parts = [
        "\n".join(["---", *head, "---"]),
        f"# {base}, {quant}",
        _made(student, base, format_name),
        "## Training\n\n" + _training(student),
        "## Evaluation\n\n" + _evaluation(origin.results, checks),
        "## Serving\n\n" + _serving(kind, quant, output.name.removesuffix(".partial")),
        "## What other engines do differently\n\n"
        + "\n".join(f"- {sentence}" for sentence in kind.all_deviations(student) or ["Nothing."]),
        "## Licence\n\n" + _license(origin),
    ]
    with writing(output):
        (output / "README.md").write_text("\n\n".join(parts) + "\n")


def origin_of(name: str) -> Origin:
    """Return what is known of a model by the name that a run has for it: a name of the hub, or a folder, whose
    README.md may declare base model and licence in its front matter."""
    if Path(name).name == smollm2.EMBEDDED:
        return _EMBEDDED
    if not Path(name).exists():
        return Origin(name if _HUB_NAME.fullmatch(name) else "", "")
    file = Path(name) / "README.md"
    text = ""
    if name and file.is_file():
        with utf8(file) as stream:
            text = stream.read()
    front = text.split("---", 2)[1] if text.startswith("---") else ""
    declared = dict(line.split(":", 1) for line in front.splitlines() if ":" in line)
    return Origin(declared.get("base_model", "").strip(" '\""), declared.get("license", "").strip())


def _made(student: Student, base: str, format_name: str) -> str:
    quant = student.quant
    method = "LLM-QAT (arXiv 2305.17888)" if student.run else student.ptq_method or "a method that is not recorded"
    weights, activations = quant.weights, quant.activations
    group = f"one per {weights.group_size} input channels" if weights.group_size else "one per output channel"
    measured = "measured before training" if student.run else "measured on calibration text"
    fused = "one per tensor, shared by what engines fuse (q, k and v; gate and up)"
    if weights.scales_tensors:
        group = f"{group}, over {fused}" if weights.group_size else fused
    if (dtype := str(weights.by.scale_dtype).removeprefix("torch.")) != "float32":
        group += f", {dtype}"
    inputs = f"one per {activations.group_size} channels of a token" if activations.group_size else "one per token"
    inputs = "one per layer, learned" if activations.learned else f"{inputs}, dynamic"
    if activations.scales_tensors:
        static = f"one per tensor, {measured}"
        inputs = f"{inputs}, over {static}" if activations.group_size else static
    return "\n".join(
        [
            f"{base} in low precision, by {method}. W-A-KV {quant}; 16 means not quantized.",
            "",
            "| | bits | quantizer | scales |",
            "|---|---|---|---|",
            f"| weights of the decoder's linear layers | {quant.w_bits} | {quant.w_quantizer} | {group} |",
            f"| their inputs | {quant.a_bits} | {quant.a_quantizer} | {inputs} |",
            _cache_row(quant),
            "",
            *(f"Layers that match `{name}`: {_listed(own)}.\n" for name, own in quant.overrides.items()),
            f"{_unquantized(student)} are in {str(student.dtype).removeprefix('torch.')}. Format: {format_name}.",
        ]
    )


def _unquantized(student: Student) -> str:
    """Name the parts whose weights are floats, at the beginning of a sentence."""
    described = architecture_of(read_config(str(student.directory)))
    quantized = {name for name, own in student.vocabulary_settings.items() if own.weights.quantizes}
    parts = {described.embedding: "embedding", "": "norms", described.head: described.head}
    *first, last = [part for name, part in parts.items() if name not in quantized]
    return f"{', '.join(first)} and {last}".capitalize() if first else last.capitalize()


def _cache_row(quant: QuantConfig) -> str:
    if quant.kv.quantizes and not quant.kv_formats[0].adjustable:
        meanings = dict.fromkeys(cache.meaning for cache in quant.kv_formats)
        return f"| KV cache | {quant.kv_bits} | {quant.kv_format} | {'; '.join(meanings)} |"
    group = quant.kv.group_size
    one_per = f"{group} channels" if group else quant.kv_granularity.replace("_", " and ")
    return (
        f"| KV cache | {quant.kv_bits} | {quant.kv_quantizer}, {quant.kv_site}, rotation {quant.kv_rotation} | "
        f"one per {one_per} |"
    )


def _listed(changes: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in changes.items())


def _training(student: Student) -> str:
    if not student.run:
        if student.ptq_method:
            return "None."
        return "Not recorded: the exported folder has no training run beside it."
    settings = student.run["settings"]
    listed = ", ".join(f"{name} {settings[name]}" for name in _TRAINING if name in settings)
    last = student.last_step()
    seen = f" It had seen {last['tokens']:,} tokens after step {last['step']}." if last else ""
    loss = settings.get("loss")
    alone = loss in LOSSES and not LOSSES[loss].needs_teacher
    learned = "next tokens of the data" if alone else "full-precision model's next-token distributions"
    return f"The student learned the {learned}. DeepSpeed ZeRO-3, AdamW: {listed}.{seen}\n\nData: {_data(student.run)}"


def _data(run: dict[str, Any]) -> str:
    """Describe the training data by the manifest of the shards, if they are where the run found them."""
    fingerprint = f"shards with the fingerprint {run['settings']['data']}"
    manifest = Path(run.get("data", "")) / MANIFEST
    if not manifest.is_file():
        return f"{fingerprint}."
    settings = read_json(manifest)
    return f"{fingerprint}, made by launch/generate.py: " + ", ".join(f"{k} {v}" for k, v in settings.items()) + "."


def _evaluation(files: list[Path], checks: str) -> str:
    rows = [row for file in files for row in _rows(file)]
    table = ["| evaluated | on | result |", "|---|---|---|", *rows, ""] if rows else []
    return "\n".join([*table, checks or "The export was not verified."])


def _rows(file: Path) -> list[str]:
    try:
        result: dict[str, Any] = json.loads(file.read_text())
        settings = result["settings"]
        what = Path(settings["model"]).name if settings["method"] == "as_is" else settings["method"]
        rows = [
            f"| {what} | {text}, windows of {settings['window']} | "
            f"perplexity {score['perplexity']:.3f} ({score['tokens']:,} tokens) |"
            for text, score in result["texts"].items()
        ]
        rows += [
            f"| {what} | {task} | {score['metric']} {score['accuracy']:.4f} ± {score['stderr']:.4f} |"
            for task, score in result["tasks"].items()
        ]
        return rows
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{file} is no result of launch/evaluate.py ({type(error).__name__}: {error}).") from error


def _serving(kind: ExportFormat, quant: QuantConfig, name: str) -> str:
    commands = kind.serve(name)
    if quant.one_kv_format and (flags := kind.cache_flags(quant)):
        bare = [command.partition(" #")[0].rstrip() for command in commands]
        commands = [*commands, *(f"{command} {flags}   # with the KV cache as trained" for command in bare)]
    if kind.runs_as_trained:
        commands = [*commands, f"python launch/chat.py --model {name}   # as trained, with the packed KV cache"]
    shell = "\n".join(["```", *commands, "```"])
    return f"{shell}\n\nIn Python, as trained:\n\n{_IN_PYTHON.format(name=name)}" if kind.runs_as_trained else shell


def _license(origin: Origin) -> str:
    if origin.license:
        return f"{origin.license}, that of {origin.base_model or 'the base model'}."
    return "That of the base model, which is not recorded here: look it up before you pass this on."
