"""The results of an evaluation: a JSON file that grows with each measurement, and the lines that are printed."""

import hashlib
import importlib.metadata
import importlib.util
import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from launch import cli
from qat.evaluate.perplexity import TextScore, Windows, WindowScore
from qat.evaluate.tasks import ZERO_SHOT, Flips, zero_shot_average
from qat.quant.config import QuantConfig
from qat.quant.linear import ARITHMETIC, arithmetic_of, can_multiply_codes
from qat.quant.number_format import FULL_PRECISION
from qat.runtime.errors import UserError, differences
from qat.runtime.files import write_atomically, writing
from qat.runtime.machine import machine


class Results:
    """Results, kept in a JSON file from one measurement to the next; only the first rank writes."""

    def __init__(self, path: Path | None, settings: dict[str, Any]):
        self._path = path
        measured_by = ("lm-eval",) if importlib.util.find_spec("lm_eval") else ()  # an extra, [eval]: for tasks alone
        packages = ("torch", "transformers", *measured_by)
        self._content: dict[str, Any] = {
            "settings": settings,
            "texts": {},
            "tasks": {},
            "seconds": {},
            "ranks": cli.ranks(),
            "machine": machine(),
            "arithmetic": _arithmetic_now(settings),
            "versions": {package: importlib.metadata.version(package) for package in packages},
        }
        if path and path.exists():
            self._content = read(path, "--output")
            _check_same(self._content, settings, path)
        self.texts, self.tasks = self._content["texts"], self._content["tasks"]

    def has(self, text: str, windows: Windows) -> bool:
        return self.texts.get(text, {}).get("digest") == digest_of(windows)

    def keep_text(self, text: str, windows: Windows, scores: list[WindowScore]) -> None:
        self.texts[text] = {"digest": digest_of(windows), **asdict(TextScore.of(scores))}

    def keep_served(self, megabytes: float, cache: str, tokens_per_second: float) -> None:
        """Keep the size of the file that llama.cpp serves, and its speed with a cache."""
        served = self._content.setdefault("served", {"file_MB": round(megabytes, 2), "tokens_per_second": {}})
        served["tokens_per_second"][cache] = round(tokens_per_second, 2)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Time the measurement of ``name`` in this context; afterwards write the results to the file, and print this
        one even if the file cannot be written."""
        began = time.monotonic()
        yield
        self._content["seconds"][name] = round(time.monotonic() - began, 1)
        if not cli.is_first_rank():
            return
        try:
            if self._path:
                with writing(self._path):
                    write_atomically(self._path, json.dumps(self._content, indent=2) + "\n")
        finally:
            self.show([name])

    def check_writable(self) -> None:
        """Raise UserError if the file cannot be written, before hours of measuring."""
        if self._path:
            with writing(self._path):
                self._path.parent.mkdir(parents=True, exist_ok=True)
                tempfile.TemporaryFile(dir=self._path.parent).close()

    def show(self, names: list[str]) -> None:
        """Print a line for each of these texts and tasks."""
        for name in names:
            cli.say(self._text_line(name) if name in self.texts else self._task_line(name))

    def _text_line(self, text: str) -> str:
        score = self.texts[text]
        kl = "" if score["kl"] is None else f", KL to the teacher {score['kl']:.4f} ± {score['kl_stderr']:.4f} nats"
        if score.get("top1") is not None:  # files of earlier versions lack it
            kl += f" (99th percentile {score['kl_p99']:.3f}), same top token {100 * score['top1']:.2f}%"
        return f"perplexity {score['perplexity']:.3f} on {score['tokens']} tokens of {text}{kl}"

    def _task_line(self, task: str) -> str:
        score = self.tasks[task]
        accuracy = f"{score['accuracy']:.4f} ± {score['stderr']:.4f}"
        return f"{task} {score['metric']} {accuracy} on {score['documents']} documents"

    def show_average(self, tasks: list[str]) -> None:
        """Print the zero-shot average, if ``tasks`` has them all."""
        if cli.is_first_rank() and set(ZERO_SHOT) <= set(tasks):
            mean, stderr = zero_shot_average(self.tasks)
            cli.say(f"zero-shot average {mean:.4f} ± {stderr:.4f}")

    def show_flips(self, before: dict[str, Any], baseline: Path | None) -> None:
        """Print how many answers differ from ``before``, the scores of tasks in the file ``baseline``."""
        for task, score in before.items() if cli.is_first_rank() else ():
            cli.say(f"{task}: {Flips.of(score, self.tasks[task])}, from {baseline}")


def read(path: Path, flag: str) -> dict[str, Any]:
    """Return the results in the file that ``flag`` names; raise UserError if it has none."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict) or not {"settings", "texts", "tasks", "seconds"} <= content.keys():
        raise UserError(f"{path} is not a result of launch/evaluate.py: give another {flag}.")
    return content


def _check_same(content: dict[str, Any], settings: dict[str, Any], path: Path) -> None:
    """Raise UserError if the results in the file ``path`` were measured with other settings: they would be lost."""
    before, now = ({**given, **(given.get("quant") or {})} for given in (content["settings"], settings))
    before.setdefault("dtype", now.get("dtype"))  # files of earlier versions lack it
    for given in (before, now):
        given.pop("quant", None)
    if listed := differences(before, now):
        raise UserError(
            f"{path} holds results of other settings ({listed}): give the same settings, or another --output, or "
            "delete it."
        )
    if (measured_with := _arithmetic_of(content)) != (today := _arithmetic_now(settings)):
        raise UserError(
            f"{path} holds results of a version that computed differently ({measured_with}; now {today}): give "
            "another --output, or delete it."
        )


def _arithmetic_now(settings: dict[str, Any]) -> str:
    """Return how this version computes the results of ``settings``."""
    return arithmetic_of(QuantConfig(**settings["quant"])) if settings["quant"] else ARITHMETIC


def _arithmetic_of(content: dict[str, Any]) -> str:
    """Return how a file's numbers were computed. The first version recorded for each whether its products were of codes
    or of floats; where codes cannot be multiplied, or nothing is quantized, floats are right."""
    quant = QuantConfig(**content["settings"]["quant"] or {"w_bits": FULL_PRECISION})
    in_codes = can_multiply_codes(quant.weights, quant.activations)
    if "arithmetic" in content or not in_codes:
        return content.get("arithmetic", ARITHMETIC)
    return "products of floats" if "floats" in content.get("products", {"": "floats"}).values() else ARITHMETIC


def digest_of(windows: Windows) -> str:
    digest = hashlib.sha256()
    for tensor in (*windows.ids, *(windows.counted or ())):
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()[:16]
