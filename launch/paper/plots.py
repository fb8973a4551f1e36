"""Plots of training runs and of results."""

import math
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from launch.paper.curve import Curve

_BLUE, _RED, _GREY, _GREEN, _ORANGE = "#2563eb", "#dc2626", "#6b7280", "#16a34a", "#ea580c"
_COLOURS = {"full_precision": _GREY, "rtn": _RED, "gptq": _GREEN, "smoothquant": _ORANGE, "qat": _BLUE}
LABELS = {
    "full_precision": "full precision",
    "rtn": "RTN",
    "gptq": "GPTQ",
    "smoothquant": "SmoothQuant",
    "qat": "LLM-QAT",
    "llama_q4_0": "llama.cpp's Q4_0",
    "llama_q4_k_m": "llama.cpp's Q4_K_M",
}
"""The methods' names in tables and plots, where these are others than in flags."""


def label(method: str) -> str:
    """Return a method's name in tables and plots."""
    return LABELS.get(method, method)


def _title(cell: dict[str, Any]) -> str:
    """Return a cell's name for an axis: method and bits, then its settings, in lines of a length that fits."""
    bits = "" if cell["method"].startswith("llama_") else f" {cell['bits']}"
    settings = [change for change in cell["changes"] if not change.startswith("windows=")]
    lines = textwrap.wrap(", ".join(settings), 62, break_long_words=False, break_on_hyphens=False)
    return "\n".join([label(cell["method"]) + bits, *lines])


def plot_training(log: list[dict[str, Any]], path: Path) -> None:
    """Plot KL to the teacher and learning rate over the optimizer steps of ``log.jsonl``."""
    steps = [record["step"] for record in log]
    kl = [record["kl"] for record in log]
    figure = _figure(7, 4)
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
    """Plot the perplexity of the teacher, and of the same quantization untrained and trained."""
    figure = _figure(5, 4)
    axes = figure.add_subplot()
    bars = axes.bar(list(perplexities), list(perplexities.values()), color=[_GREY, _RED, _BLUE], width=0.6)
    axes.bar_label(bars, fmt="%.1f")
    axes.set(ylabel="perplexity on held-out prose (lower is better)", title="What quantization costs")
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def plot_cells(cells: list[dict[str, Any]], path: Path) -> None:
    """Plot the KL to the teacher of each cell of a table of results, the mean over its texts."""
    titles = [_title(cell) for cell in reversed(cells)]
    figure = _figure(10, 1.2 + sum(0.15 + 0.13 * len(title.splitlines()) for title in titles))
    axes = figure.add_subplot()
    for place, cell in enumerate(reversed(cells)):
        kl = statistics.fmean(score["kl"] for score in cell["texts"].values())
        axes.barh(place, kl, color=_COLOURS.get(cell["method"], _GREY))
        axes.annotate(f" {kl:.3f}", (kl, place), va="center", fontsize=8)
    axes.set_yticks(range(len(cells)), titles, fontsize=7)
    axes.set(xlabel="KL(teacher ‖ student), nats per token (lower is better)")
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def plot_curves(curves: Sequence["Curve"], path: Path) -> None:
    """Plot KL against the tokens of training, both logarithmic, with the laws that are fitted to the points."""
    figure = _figure(7, 4.5)
    axes = figure.add_subplot()
    for curve, colour in zip(curves, (_BLUE, _ORANGE, _GREEN, _RED, _GREY) * len(curves), strict=False):
        axes.plot(curve.tokens, curve.kl, "o", color=colour, label=f"{curve.name}, {curve.text}")
        ahead = [curve.tokens[0] * 1.25**step for step in range(40)]
        for law, style in zip(curve.laws, (":", "--"), strict=False):
            axes.plot(ahead, [law(tokens) for tokens in ahead], style, color=colour, linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel="tokens trained on", ylabel="KL(teacher ‖ student), nats per token")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", frameon=False, fontsize=8)
    _save(figure, path)


def plot_served(cells: list[dict[str, Any]], path: Path) -> None:
    """Plot the KL to the teacher of what llama.cpp serves, the mean over its texts: a row for each model, a point for
    each KV cache."""
    titles = [f"{_title(cell)} ({cell['served']['file_MB']:.0f} MB)" for cell in cells]
    figure = _figure(10, 1.6 + sum(0.15 + 0.13 * len(title.splitlines()) for title in titles))
    axes = figure.add_subplot()
    for cache, marker in zip(cells[0]["served"]["tokens_per_second"], "o^sD", strict=False):
        scores = [
            [score["kl"] for name, score in cell["texts"].items() if name.endswith(f", {cache} cache")]
            for cell in cells
        ]
        axes.plot([statistics.fmean(values) for values in scores], range(len(cells)), marker, label=f"{cache} cache")
    axes.set_yticks(range(len(cells)), titles, fontsize=7)
    axes.invert_yaxis()
    axes.set(xlabel="KL(teacher ‖ what llama.cpp serves), nats per token (lower is better)", xlim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    _save(figure, path)


def plot_bits(
    cells: list[dict[str, Any]], accuracy: Mapping[str, tuple[float, float]], settings: Sequence[str], path: Path
) -> None:
    """Plot the perplexity of each method over the paper's settings, above full precision: one plot for each text, and
    one for the zero-shot average, if there is any.

    Args:
        accuracy: zero-shot average and its standard error, by the name of the cell
        settings: W-A-KV, in the order in which they stand
    """
    usual = [cell for cell in cells if not cell["changes"]]
    full = [cell for cell in usual if cell["method"] == "full_precision"]
    if not full:
        return
    texts = full[0]["texts"]
    panels: list[tuple[str, dict[str, tuple[float, float]]]] = [
        (f"perplexity, {text}", {cell["name"]: (cell["texts"][text]["perplexity"], 0.0) for cell in usual})
        for text in texts
    ]
    if accuracy:
        panels.append(("zero-shot average", dict(accuracy)))
    figure = _figure(5 * len(panels), 4.3)
    for number, (title, values) in enumerate(panels, 1):
        axes = figure.add_subplot(1, len(panels), number)
        for method, beside in {"rtn": -0.15, "gptq": -0.05, "smoothquant": 0.05, "qat": 0.15}.items():
            # What is not measured yet is left blank. Points stand side by side, so that no error bar hides another.
            points = [values.get(f"{method}_{bits}", (math.nan, math.nan)) for bits in settings]
            means, errors = zip(*points, strict=True)
            places = [place + beside for place in range(len(settings))]
            axes.errorbar(places, means, errors, fmt="o-", color=_COLOURS[method], label=LABELS[method])
        if full[0]["name"] in values:
            axes.axhline(values[full[0]["name"]][0], color=_GREY, linestyle=":", label=LABELS["full_precision"])
        axes.set_xticks(range(len(settings)), settings, rotation=45)
        axes.set(title=title, xlim=(-0.5, len(settings) - 0.5))
        if title.startswith("perplexity"):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("{x:g}")
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    _save(figure, path)


def _smooth(values: list[float], weight: float = 0.85) -> list[float]:
    """Return the exponential moving average, corrected for its start."""
    smoothed, total, mass = [], 0.0, 0.0
    for value in values:
        total, mass = weight * total + value, weight * mass + 1
        smoothed.append(total / mass)
    return smoothed


def _figure(width: float, height: float) -> "Figure":
    """Return an empty figure of ``width`` x ``height`` inches."""
    from matplotlib.figure import Figure  # imported here: it takes a second, and few commands draw

    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: "Figure", path: Path) -> None:
    import matplotlib as mpl

    with mpl.rc_context({"savefig.dpi": 150}):
        figure.savefig(path)
