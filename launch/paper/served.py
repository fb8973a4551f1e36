"""The table of what llama.cpp serves: a row for each model and KV cache."""

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from launch.paper.claims import Difference
from launch.paper.plots import label
from launch.paper.tables import table

Cell = dict[str, Any]

TITLE = "Served by llama.cpp"
_NAME = "{}, {} cache"
"""Name of the result of a text and a cache, as launch/evaluate.py writes it."""

_OF_ALL = ("windows=",)
"""Settings that all cells share."""


_LLAMA_CPPS = "llama_"
"""Prefix of the names of llama.cpp's own methods; their cells record the bits of the original model."""


def texts_of(cell: Cell) -> list[str]:
    return cell["settings"]["text"].split(",")


def by_cache(cell: Cell) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each cache, and what it gave by text."""
    for cache in cell["served"]["tokens_per_second"]:
        yield cache, {text: cell["texts"][_NAME.format(text, cache)] for text in texts_of(cell)}


def settings_of(cell: Cell) -> str:
    """Return what distinguishes a cell from the others of its method: all but what all cells share."""
    return ", ".join(change for change in cell["changes"] if not change.startswith(_OF_ALL))


def rows(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Return the rows of the table as data."""
    made = []
    for cell in cells:
        first = None
        for cache, scores in by_cache(cell):
            first = first or scores
            cost = Difference.of({"texts": scores}, {"texts": first})
            row = {name: cell[name] for name in ("name", "method", "settings", "machine", "versions")}
            row["bits"] = None if cell["method"].startswith(_LLAMA_CPPS) else cell["bits"]
            row |= {"cache": cache, "file_MB": cell["served"]["file_MB"]}
            row |= {"tokens_per_second": cell["served"]["tokens_per_second"][cache]}
            for measure in ("perplexity", "nll", "nll_stderr", "kl", "kl_stderr", "top1", "top1_stderr", "tokens"):
                row[measure] = {text: score[measure] for text, score in scores.items()}
            made.append(row | {"cache_costs": cost.mean, "cache_costs_stderr": cost.stderr})
    return made


def markdown(cells: Sequence[Cell], of: int) -> str:
    """Return the section of the page of results; ``of`` is the number of cells that there will be."""
    parts = [f"## {TITLE}", _INTRODUCTION]
    if cells:
        texts = texts_of(cells[0])
        head = [
            "method",
            "W-A-KV",
            "settings",
            "MB",
            "cache",
            *(f"ppl {t}" for t in texts),
            *(f"KL {t}" for t in texts),
        ]
        head += ["same top token, %", "the cache costs"]
        lines = []
        settings = {cell["name"]: settings_of(cell) for cell in cells}
        for row in rows(cells):
            line = [
                label(row["method"]),
                row["bits"] or "",
                settings[row["name"]],
                f"{row['file_MB']:.1f}",
                row["cache"],
            ]
            line += [f"{value:.2f}" for value in row["perplexity"].values()]
            line += [f"{row['kl'][text]:.4f} ± {row['kl_stderr'][text]:.4f}" for text in texts]
            line += [f"{100 * statistics.fmean(row['top1'].values()):.1f}"]
            line += [
                f"{row['cache_costs']:+.4f} ± {row['cache_costs_stderr']:.4f}" if row["cache_costs_stderr"] else ""
            ]
            lines.append(line)
        parts += [table(head, lines)]
    parts += [f"{len(cells)} of {of} models."]
    parts += [f"![{TITLE}](served.png)"] if cells else []
    return "\n\n".join(parts)


_INTRODUCTION = """Each file as llama.cpp (PyPI's xllamacpp, on a CPU) serves it with four kinds of KV cache: f16, q8_0,
q8_0 keys with q4_0 values, q4_0. *W-A-KV* and *settings* are what was trained or rounded: a model of 16 bits for KV was
not trained for any cache. *The cache costs* is its KL less that of the same file with an f16 cache, nats per token, by
pairs of windows. llama.cpp's own Q4_0 and Q4_K_M are made of the same full-precision model, without an importance
matrix. This model's weights were published as Q4_1, from which 4-bit types in blocks of 32 lose less than they would
from a model in bf16.
Tokens/s, which depend on the types alone, are in [evaluation.md](../evaluation.md#what-llamacpp-serves); those in the
JSON were measured beside other work."""
