"""Pictures and sizes of a run."""

from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

_BLUE, _RED, _GREY = "#2563eb", "#dc2626", "#6b7280"


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
