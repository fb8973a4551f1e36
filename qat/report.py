"""Pictures and sizes of a run."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

_BLUE, _RED, _GREY, _GREEN, _ORANGE = "#2563eb", "#dc2626", "#6b7280", "#16a34a", "#ea580c"
_COLOURS = {"full_precision": _GREY, "rtn": _RED, "gptq": _GREEN, "smoothquant": _ORANGE, "qat": _BLUE}
LABELS = {
    "full_precision": "full precision",
    "rtn": "RTN",
    "gptq": "GPTQ",
    "smoothquant": "SmoothQuant",
    "qat": "LLM-QAT",
}
"""The methods' names in tables and pictures."""


def weights_size(directory: Path) -> int:
    """Bytes of the weight files of a model directory."""
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


def plot_training(log: list[dict[str, Any]], path: Path) -> None:
    """KL to the teacher and learning rate over the optimizer steps of ``log.jsonl``."""
    steps = [record["step"] for record in log]
    kl = [record["kl"] for record in log]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(steps, kl, color=_BLUE, alpha=0.3, linewidth=1)
    axes.plot(steps, _smooth(kl), color=_BLUE, label="KL(teacher ‖ student), smoothed")
    axes.set(xlabel="optimizer step", ylabel="nats per token", ylim=(0, None), title="Training")
    rate = axes.twinx()
    rate.plot(steps, [record["lr"] for record in log], color=_GREY, linestyle=":", label="learning rate")
    rate.set(ylabel="learning rate", ylim=(0, None))
    rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    _save(figure, path)


def plot_comparison(perplexities: dict[str, float], path: Path) -> None:
    """Perplexity of the teacher, and of the same quantization untrained and trained."""
    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.add_subplot()
    bars = axes.bar(list(perplexities), list(perplexities.values()), color=[_GREY, _RED, _BLUE], width=0.6)
    axes.bar_label(bars, fmt="%.1f")
    axes.set(ylabel="perplexity on held-out prose (lower is better)", title="What quantization costs")
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def plot_cells(cells: list[dict[str, Any]], path: Path) -> None:
    """KL to the teacher of each cell of a table of results, the mean over its texts."""
    figure = Figure(figsize=(8, 1.2 + 0.27 * max(1, len(cells))), layout="constrained")
    axes = figure.add_subplot()
    for place, cell in enumerate(reversed(cells)):
        kl = statistics.fmean(score["kl"] for score in cell["texts"].values())
        axes.barh(place, kl, color=_COLOURS[cell["method"]])
        axes.annotate(f" {kl:.3f}", (kl, place), va="center", fontsize=8)
    axes.set_yticks(range(len(cells)), [cell["name"] for cell in reversed(cells)], fontsize=8)
    axes.set(xlabel="KL(teacher ‖ student), nats per token (lower is better)")
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def plot_bits(cells: list[dict[str, Any]], settings: Sequence[str], path: Path) -> None:
    """Log-perplexity of each method over the paper's settings, above full precision: one picture for each text."""
    full = [cell for cell in cells if cell["method"] == "full_precision"]
    usual = [cell for cell in cells if not cell["changes"]]
    if not full:
        return
    texts = full[0]["texts"]
    figure = Figure(figsize=(10, 4), layout="constrained")
    for number, text in enumerate(texts, 1):
        axes = figure.add_subplot(1, len(texts), number)
        for method in ("rtn", "gptq", "smoothquant", "qat"):
            own = {cell["bits"]: cell["texts"][text]["perplexity"] for cell in usual if cell["method"] == method}
            there = [place for place, bits in enumerate(settings) if bits in own]
            axes.plot(there, [own[settings[p]] for p in there], "o-", color=_COLOURS[method], label=LABELS[method])
        axes.axhline(texts[text]["perplexity"], color=_GREY, linestyle=":", label=LABELS["full_precision"])
        axes.set_xticks(range(len(settings)), settings, rotation=45)
        axes.set(yscale="log", ylabel="perplexity (lower is better)", title=text)
        axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    _save(figure, path)


def _smooth(values: list[float], weight: float = 0.85) -> list[float]:
    """Exponential moving average, corrected for its start."""
    smoothed, total, mass = [], 0.0, 0.0
    for value in values:
        total, mass = weight * total + value, weight * mass + 1
        smoothed.append(total / mass)
    return smoothed


def _save(figure: Figure, path: Path) -> None:
    with mpl.rc_context({"savefig.dpi": 150}):
        figure.savefig(path)
