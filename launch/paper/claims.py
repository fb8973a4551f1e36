"""Tables of results, and the check of the paper's claims against them.

A cell is the JSON that launch/reproduce.py writes: a method, its settings, and its measurements. Two cells are compared
in pairs, by their KL to the teacher on the same windows of text: that distinguishes them where accuracies cannot.
"""

import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from launch.paper import curve, flips
from launch.paper.plots import LABELS, label
from launch.paper.tables import table
from qat.evaluate.perplexity import standard_error
from qat.evaluate.tasks import FEW_SHOT, ZERO_SHOT, zero_shot_average
from qat.quant.config import QuantConfig
from qat.quant.linear import can_multiply_codes

Cell = dict[str, Any]

TITLES = {
    "main": "Main results",
    "recipes": "Recipes",
    "kv": "The KV cache",
    "distillation": "What the student learns from",
    "quantizers": "Quantizers",
    "data": "Training data",
    "rotations": "Rotated weights and 4-bit activations",
    "budget": "How long to train",
    "low_bits": "Weights of 4, 3 and 2 bits",
    "chat": "Dialogues among the training data",
    "floats": "Formats of floats: NVFP4, MXFP4, FP8",
}
SETTINGS = ("4-8-4", "4-8-8", "4-6-16", "4-8-16", "4-16-16", "8-8-4", "8-8-8", "8-8-16")
"""The paper's settings, W-A-KV."""

_SURE = 2.0
"""Number of standard errors by which two cells must differ to be distinguished."""

_TARGET = 0.75
_PTQ = ("rtn", "gptq", "smoothquant")


@dataclass(frozen=True)
class Difference:
    """A mean of paired differences, and its standard error."""

    mean: float
    stderr: float

    @classmethod
    def of(cls, a: Cell, b: Cell, text: str | None = None) -> "Difference":
        """Compute the mean over the windows of KL(a) - KL(b), in nats per token, of one text or of all."""
        pairs = [
            first - second
            for text in ([text] if text else a["texts"])
            for first, second in zip(a["texts"][text]["window_kl"], b["texts"][text]["window_kl"], strict=True)
        ]
        return cls(statistics.fmean(pairs), standard_error(pairs))

    @property
    def sure(self) -> bool:
        return abs(self.mean) > _SURE * self.stderr

    def __str__(self) -> str:
        return f"{self.mean:+.4f} ± {self.stderr:.4f}"


@dataclass(frozen=True)
class Finding:
    """The result of checking a claim on the cells: a verdict, and the numbers behind it."""

    verdict: str
    numbers: str


HOLDS, FAILS, UNDECIDED = "holds", "does not hold", "undecided"
NOT_MEASURED = Finding("not measured yet", "")


def mean_kl(cell: Cell) -> float:
    """Return a cell's mean KL over all its texts, in nats per token."""
    return statistics.fmean(score["kl"] for score in cell["texts"].values())


def accuracy_difference(pairs: Sequence[tuple[Cell, Cell]]) -> Difference:
    """Compute the zero-shot average of the first of each pair minus that of the second, in points, averaged over the
    pairs; paired by documents, which must be the same everywhere."""
    means, squares = [], 0.0
    for task in ZERO_SHOT:
        outcomes = [(a["tasks"][task]["correct"], b["tasks"][task]["correct"]) for a, b in pairs]
        gained = [[int(x) - int(y) for x, y in zip(a, b, strict=True)] for a, b in outcomes]
        documents = [100 * statistics.fmean(document) for document in zip(*gained, strict=True)]
        means.append(statistics.fmean(documents))
        squares += standard_error(documents) ** 2
    return Difference(statistics.fmean(means), math.sqrt(squares) / len(means))


def flip_difference(pairs: Sequence[tuple[Cell, Cell]], teacher: Cell) -> Difference | None:
    """Compute the share of documents that the first of each pair answers right where ``teacher`` is wrong, or the other
    way, minus that of the second, in points, averaged over the pairs; paired by documents. None without common ones."""
    gained: list[float] = []
    for task in _common_tasks([teacher, *itertools.chain(*pairs)]):
        right = teacher["tasks"][task]["correct"]
        outcomes = [[cell["tasks"][task]["correct"] for cell in pair] for pair in pairs]
        flipped = [
            [100 * ((x != own) - (y != own)) for x, y, own in zip(a, b, right, strict=True)] for a, b in outcomes
        ]
        gained += [statistics.fmean(document) for document in zip(*flipped, strict=True)]
    return Difference(statistics.fmean(gained), standard_error(gained)) if gained else None


def _common_tasks(cells: Sequence[Cell]) -> list[str]:
    """Return the tasks that all cells were measured on, with as many documents."""
    tasks = set.intersection(*(set(cell["tasks"]) for cell in cells))
    return sorted(task for task in tasks if len({len(cell["tasks"][task]["correct"]) for cell in cells}) == 1)


def zero_shot_averages(accuracies: Mapping[str, Cell]) -> dict[str, tuple[float, float]]:
    """Return mean accuracy and standard error, by name, of each cell that has all of the zero-shot tasks."""
    whole = {name: cell["tasks"] for name, cell in accuracies.items() if set(ZERO_SHOT) <= set(cell["tasks"])}
    return {name: zero_shot_average(tasks) for name, tasks in whole.items()}


def gap_closed(cell: Cell, rtn: Cell, full_precision: Cell) -> dict[str, float]:
    """Return, for each text, the share of RTN's distance to full precision, in log-perplexity, that ``cell`` closes."""
    closed = {}
    for text, score in cell["texts"].items():
        worst, best = rtn["texts"][text]["nll"], full_precision["texts"][text]["nll"]
        closed[text] = (worst - score["nll"]) / (worst - best)
    return closed


def counterpart(cell: Cell, method: str, cells: Mapping[str, Cell]) -> Cell | None:
    """Return the cell of ``method`` with the same quantization and, but for RTN, the same rotation of the weights,
    measured on the same texts; for full precision, the only one of these; None if there is none."""
    same = {"text", "window", "windows"}
    if method != "full_precision":
        same |= QuantConfig.__dataclass_fields__.keys()
    rotation = cell["settings"].get("rotation") if method not in ("rtn", "full_precision") else None
    for other in cells.values():
        theirs = other["settings"]
        alike = all(theirs.get(key) == cell["settings"].get(key) for key in same)
        if other["method"] == method and alike and theirs.get("rotation") == rotation:
            return other
    return None


def seeds(cells: Mapping[str, Cell]) -> list[tuple[Cell, Cell]]:
    """Return pairs of the cells that were made twice: with seed 0, and with another seed."""
    bases = [(cells.get(name.replace(f"_seed={cell['seed']}", "")), cell) for name, cell in cells.items()]
    return [(base, cell) for base, cell in bases if base and base is not cell]


def seed_spread(cells: Mapping[str, Cell], *bits: str) -> float:
    """Return the largest change of the mean KL that another seed makes with one of these bits or, if none was tried
    with them, in any of the paper's settings; 0 if none was."""
    found = seeds(cells)
    near = [pair for pair in found if pair[0]["bits"] in bits] or [p for p in found if p[0]["bits"] in SETTINGS]
    return max((abs(mean_kl(base) - mean_kl(cell)) for base, cell in near), default=0.0)


@dataclass(frozen=True)
class Claim:
    """The claim that the first cell of each pair is closer to the teacher than the second; or, if not ``strictly``,
    that it is no farther. Cells are given by name.

    Two cells differ if their difference exceeds its standard errors and, if one of them was trained, the change
    that another seed makes.

    Args:
        on: for each pair, the text that it is measured on; all texts, where there is none
    """

    text: str
    pairs: list[tuple[str, str]]
    strictly: bool = True
    on: tuple[str | None, ...] = ()

    def check(self, cells: Mapping[str, Cell]) -> Finding:
        found = []
        for (first, second), on in zip(self.pairs, self.on or [None] * len(self.pairs), strict=True):
            if first in cells and second in cells:
                difference = Difference.of(cells[first], cells[second], on)
                trained = "qat" in (cells[first]["method"], cells[second]["method"])
                where = f" on {on}" if on else ""
                by_seed = seed_spread(cells, cells[first]["bits"], cells[second]["bits"]) if trained else 0.0
                verdict = self._verdict(difference, by_seed)
                found.append((verdict, f"{first} - {second}{where}: {difference}"))
        return _together(found, len(self.pairs))

    def _verdict(self, difference: Difference, by_seed: float) -> str:
        if not difference.sure or abs(difference.mean) <= by_seed:
            return UNDECIDED if self.strictly else HOLDS
        return HOLDS if difference.mean < 0 else FAILS


TALK = "text=encyclopedia+dialogues_windows=64"
CHATS = (f"{TALK}_data=chat_chat_share=0.25", f"{TALK}_data=chat_chat_share=0.5", f"{TALK}_data=chat")
"""The unusual settings of the cells that are measured on dialogues; and of those that learn from dialogues too."""

_PAPERS_RTN = "rtn_4-8-4_kv_granularity=token"


def closes(names: Sequence[str], cells: Mapping[str, Cell]) -> Finding:
    """Check whether each cell closes, on every text, the target share of the distance that RTN has with the paper's
    quantization. The finding also gives the share of the distance that RTN has with the cell's own."""
    found = []
    for name in names:
        cell, rtn = cells.get(name), cells.get(_PAPERS_RTN)
        full = counterpart(cell, "full_precision", cells) if cell else None
        if cell and rtn and full:
            closed = gap_closed(cell, rtn, full)
            numbers = f"{name}: {_shares(closed)}"
            own = counterpart(cell, "rtn", cells)
            if own and own is not rtn:
                numbers += f" (of its own RTN's: {_shares(gap_closed(cell, own, full))})"
            found.append((HOLDS if min(closed.values()) >= _TARGET else FAILS, numbers))
    return _together(found, len(names))


def _shares(closed: Mapping[str, float]) -> str:
    return ", ".join(f"{text} {share:.0%}" for text, share in closed.items())


def _together(found: list[tuple[str, str]], of: int) -> Finding:
    """Combine the findings of the pairs that were measured, out of ``of`` pairs, into one."""
    if not found:
        return NOT_MEASURED
    verdicts, numbers = zip(*found, strict=True)
    worst = next(verdict for verdict in (FAILS, UNDECIDED, HOLDS) if verdict in verdicts)
    everywhere = worst == HOLDS or verdicts.count(worst) == len(verdicts)
    remarks = [] if everywhere else [f"holds in {verdicts.count(HOLDS)} of {len(verdicts)}"]
    remarks += [f"{len(found)} of {of} measured"] if len(found) < of else []
    return Finding(worst + (f" ({', '.join(remarks)})" if remarks else ""), "<br>".join(numbers))


def _against_ptq(*settings: str) -> list[tuple[str, str]]:
    return [(f"qat_{bits}", f"{method}_{bits}") for bits in settings for method in _PTQ]


_AGAINST_REAL_TEXT = [
    ("qat_4-6-16", f"qat_4-6-16_max_length=228_data={text}-train") for text in ("encyclopedia", "howto")
]

CLAIMS = (
    Claim("4-8-4: LLM-QAT is better than every post-training method", _against_ptq("4-8-4")),
    Claim("8-8-4: LLM-QAT is better than SmoothQuant", [("qat_8-8-4", "smoothquant_8-8-4")]),
    Claim(
        "4-8-8: RTN is the best post-training method",
        [("rtn_4-8-8", "gptq_4-8-8"), ("rtn_4-8-8", "smoothquant_4-8-8")],
        strictly=False,
    ),
    Claim("4-8-8: LLM-QAT is better than every post-training method", _against_ptq("4-8-8")),
    Claim(
        "With a 4-bit part or 6-bit activations LLM-QAT is the best, or not distinguishable from it",
        _against_ptq("4-8-4", "4-8-8", "4-6-16", "4-8-16", "4-16-16", "8-8-4"),
        strictly=False,
    ),
    Claim("Generated data are better than real text", _AGAINST_REAL_TEXT),
    Claim("… on text of another kind than that real text", _AGAINST_REAL_TEXT, on=("howto", "encyclopedia")),
    Claim("Sampled data are better than greedy data", [("qat_4-6-16_data=sample", "qat_4-6-16_data=top1")]),
    Claim("Hybrid data are better than sampled data", [("qat_4-6-16", "qat_4-6-16_data=sample")]),
    Claim(
        "MinMax is not worse than quantizers that clip",
        [
            ("qat_4-8-16", f"qat_4-8-16_{clipping}")
            for clipping in ("w_quantizer=statsq", "a_quantizer=lsq", "w_quantizer=statsq_a_quantizer=lsq")
        ],
        strictly=False,
    ),
    Claim("Distilling logits is better than learning labels", [("qat_4-6-16", "qat_4-6-16_loss=label")]),
    Claim(
        "Distilling attention or hidden states as well is worse",
        [("qat_4-6-16", f"qat_4-6-16_loss=logits+{more}") for more in ("attention", "hidden")],
    ),
    Claim(
        "Not the paper's: a rotated KV cache is better, untrained and trained",
        [(f"{cell}_kv_rotation=hadamard", cell) for cell in ("rtn_16-16-4", "rtn_4-8-4", "qat_4-8-4")],
    ),
    Claim(
        "Not the paper's: LLM-QAT is better than RTN and GPTQ in 4-bit floats",
        [
            (f"qat_{floats}", f"{method}_{floats}")
            for floats in (
                "4-4-16_w_quantizer=nvfp4_a_quantizer=nvfp4",
                "4-16-16_w_quantizer=nvfp4",
                "4-4-16_w_quantizer=mxfp4_a_quantizer=mxfp4",
            )
            for method in ("rtn", "gptq")
        ],
    ),
)


@dataclass(frozen=True)
class Goal:
    """The goal that a cell's KL on a text is at most ``most`` nats, or, if ``of`` names another cell, at most that part
    of the other's."""

    text: str
    cell: str
    most: float
    of: str | None = None
    on: str = "encyclopedia"

    def check(self, cells: Mapping[str, Cell]) -> Finding:
        if self.cell not in cells or (self.of and self.of not in cells):
            return NOT_MEASURED
        kl = cells[self.cell]["texts"][self.on]["kl"]
        other = cells[self.of]["texts"][self.on]["kl"] if self.of else 1.0
        text = f"{self.cell}: {kl:.3f} nats" + (
            f", {1 - kl / other:.1%} of {self.of}'s {other:.3f} gone" * bool(self.of)
        )
        return Finding(HOLDS if kl <= self.most * other else FAILS, f"{text}, on {self.on}")


_ROTATED = "4-4-4_kv_rotation=hadamard_rotation"
_CLIPPED = "4-4-4_w_quantizer=minmax_asymmetric_a_quantizer=mse_kv_quantizer=mse_kv_rotation=hadamard"
_UNCLIPPED = _CLIPPED.replace("_a_quantizer=mse_kv_quantizer=mse", "")
_SERVED = "4-8-4_w_quantizer=minmax_asymmetric_kv_format=vllm_int4"

BEYOND = (
    Claim(
        "4-4-4: rotated weights are better, untrained and trained",
        [
            (f"{method}_{_ROTATED}=hadamard", f"{method}_4-4-4_kv_rotation=hadamard")
            for method in ("rtn", "gptq", "qat")
        ],
    ),
    Claim(
        "4-4-4: learned rotations are better than drawn ones",
        [(f"{method}_{_ROTATED}=learned", f"{method}_{_ROTATED}=hadamard") for method in ("rtn", "gptq", "qat")],
    ),
    Claim(
        "4-4-4: training is better than GPTQ, both rotated",
        [(f"qat_{_ROTATED}={kind}", f"gptq_{_ROTATED}={kind}") for kind in ("hadamard", "learned")],
    ),
    Claim(
        "4-4-4, rotated: training that begins with GPTQ's weights is better than GPTQ",
        [
            (f"qat_{own}_student=gptq_rotation=hadamard", f"gptq_{own}_rotation=hadamard")
            for own in ("4-4-4_kv_rotation=hadamard", _CLIPPED)
        ],
    ),
    Claim(
        "4-4-4, rotated: ranges of activations and KV that are clipped are better, untrained and trained",
        [
            (
                f"{method}_{_CLIPPED}_rotation=hadamard",
                f"{method}_{_UNCLIPPED}_rotation=hadamard",
            )
            for method in ("rtn", "gptq", "qat")
        ],
    ),
    Claim(
        "3-bit weights, trained, are better than 4-bit weights rounded to nearest",
        [(f"qat_3-8-16{own}", f"rtn_4-8-16{own}") for own in ("", "_w_quantizer=minmax_asymmetric")],
    ),
    Claim(
        "Grids with all codes are better than the paper's, trained",
        [
            (f"qat_{bits}-8-16_w_quantizer=minmax_{kind}", f"qat_{bits}-8-16")
            for bits in (4, 3, 2)
            for kind in ("full", "signed", "asymmetric")
        ],
    ),
    Claim(
        "Scales that learn are better than those of the largest weight",
        [(f"qat_{bits}-8-16_train=all", f"qat_{bits}-8-16") for bits in (4, 3, 2)],
    ),
    Claim(
        "Dialogues in the data are better on dialogues",
        [(f"qat_4-8-4_kv_rotation=hadamard_{data}", f"qat_4-8-4_kv_rotation=hadamard_{TALK}") for data in CHATS],
        on=("dialogues",) * 3,
    ),
    Claim(
        "… and no worse on prose",
        [(f"qat_4-8-4_kv_rotation=hadamard_{data}", f"qat_4-8-4_kv_rotation=hadamard_{TALK}") for data in CHATS],
        strictly=False,
        on=("encyclopedia",) * 3,
    ),
    Goal(
        "4-4-4, trained under rotations, is within 0.6 nats of the teacher",
        f"qat_{_CLIPPED}_student=gptq_rotation=hadamard",
        0.6,
    ),
    Goal(
        "4-8-4 with vLLM's cache closes 90 % of RTN's distance in KL",
        f"qat_{_SERVED}_steps=1600_decay_steps=320_sequences=3200",
        0.1,
        f"rtn_{_SERVED}",
    ),
)
"""The goals of the tables beyond the paper."""

RECIPES_4_8_4 = {
    "the paper's recipe": ["qat_4-8-4_kv_granularity=token_lr=2e-05"],
    "the same with the learning rate that suits so few steps": ["qat_4-8-4_kv_granularity=token"],
    "one scale per token and head": ["qat_4-8-4", "qat_4-8-4_seed=1"],
    "and a rotated cache": ["qat_4-8-4_kv_rotation=hadamard", "qat_4-8-4_kv_rotation=hadamard_seed=1"],
    "and four times the steps": ["qat_4-8-4_kv_rotation=hadamard_steps=400"],
    "rotated, in groups of 64 weights": ["qat_4-8-4_w_group_size=64_kv_rotation=hadamard"],
    "rotated, and initialized with GPTQ's weights": ["qat_4-8-4_kv_rotation=hadamard_student=gptq"],
    "rotated, and initialized with SmoothQuant's": ["qat_4-8-4_kv_rotation=hadamard_student=smoothquant"],
    "rotated, in groups, and initialized with GPTQ's": ["qat_4-8-4_w_group_size=64_kv_rotation=hadamard_student=gptq"],
}
"""The cells that should each close the target share of the distance."""


# Markdown.


def markdown(
    tables: Mapping[str, list[str]],
    cells: Mapping[str, Cell],
    accuracies: Mapping[str, Cell],
    whole: Mapping[str, Cell],
    peers: Mapping[str, Any],
    served: str = "",
) -> str:
    """Return the page of results: the claims, then every table.

    Args:
        tables: the names of each table's cells, in order
        cells: each cell's results on texts, by name
        accuracies: each cell's results on tasks, by name
        whole: the same on all documents
        peers: the results of benchmarks/peers.py; empty if there are none yet
        served: the section on serving
    """
    claims = [
        "| claim of the paper | at this scale | KL of the first less KL of the second, nats per token |",
        "|-|-|-|",
    ]
    claims += [_finding_line(claim.text, claim.check(cells)) for claim in CLAIMS]
    target = f"4-8-4 closes {_TARGET:.0%} of the distance to full precision of RTN with the paper's quantization"
    targets = [f"| {target} | | share of it |", "|-|-|-|"]
    targets += [_finding_line(recipe, closes(names, cells)) for recipe, names in RECIPES_4_8_4.items()]
    beyond = ["| beyond the paper | | KL, nats per token |", "|-|-|-|"]
    beyond += [_finding_line(claim.text, claim.check(cells)) for claim in BEYOND]
    parts = [*filter(None, [_INTRODUCTION, _budget(cells)]), "## Claims", *map("\n".join, (claims, targets, beyond))]
    parts += filter(None, [_mixed(cells), _spread(cells), _accuracies_by_pairs(accuracies)])
    if flipped := flips.markdown({"the first of each task": accuracies, "all of some tasks": whole}):
        parts += ["## Flips", flipped, *filter(None, [_flips_by_pairs(accuracies)])]
    for title, names in tables.items():
        there = [name for name in names if name in cells]
        parts += [f"## {TITLES[title]}", _table(there, cells, accuracies), f"{len(there)} of {len(names)} cells."]
        parts += filter(None, [_in_floats(there, cells, "cells")])
        parts += [f"![{TITLES[title]}]({title}.png)"] if there else []
        parts += filter(None, [curve.markdown(curve.curves({name: cells[name] for name in there}))])
    parts += [*filter(None, [served]), *_peers(peers)]
    parts += ["## Perplexity and accuracy against bits", "![The four methods in the paper's settings](bits.png)"]
    return "\n\n".join(parts) + "\n"


_INTRODUCTION = """# Results

Written by `python launch/reproduce.py`, which adds the cells that are missing; each cell with all its settings,
seeds, versions, times and the machine is a JSON in [cells/](cells). How to read it: perplexity and mean KL(teacher ‖
student) in nats per token, ± its standard error over the windows, on two texts that we did not train on; *closed* is
the share of RTN's distance to full precision, in log-perplexity, that is gone (both texts). A difference counts if it
exceeds two standard errors of the paired differences, window by window. If one of the two was trained, it must also
exceed the change by another seed at the same bits (if none was tried, in any of the paper's settings)."""


def _budget(cells: Mapping[str, Cell]) -> str:
    """Describe the budget of the usual cell."""
    if not (cell := cells.get("qat_4-8-4")):
        return ""
    budget = cell["budget"]
    return (
        f"Every LLM-QAT cell took {budget['steps']} optimizer steps of 2 sequences of at most {budget['max_length']} "
        f"tokens ({budget['trained']['tokens']:,} tokens in all here), at a peak learning rate of {budget['lr']:g}, "
        "unless its settings say otherwise; GPTQ and SmoothQuant are calibrated on such sequences. Each text is "
        f"measured on {budget['windows']} windows of {budget['window']} tokens."
    )


def _finding_line(what: str, finding: Finding) -> str:
    return f"| {what} | **{finding.verdict}** | {finding.numbers} |"


def _mixed(cells: Mapping[str, Cell]) -> str:
    """Say that cells of two arithmetics are compared, if there are both."""
    every = [cell for cell in cells.values() if _multiplies_codes(cell)]
    old = [cell for cell in every if _multiplied_floats(cell)]
    if len(old) in (0, len(every)):
        return ""
    return (
        f"{len(old)} of {len(every)} cells whose layers multiply codes were measured with float matmuls; the tables "
        "name them. A difference between one of these and another cell contains that change too "
        "([how much](../evaluation.md#what-rounding-alone-changes))."
    )


def _spread(cells: Mapping[str, Cell]) -> str:
    """Describe the change that another seed makes."""
    lines = [
        f"- {base['name']}: mean KL {mean_kl(base):.4f} with seed {base['seed']}, {mean_kl(cell):.4f} with seed "
        f"{cell['seed']}"
        for base, cell in seeds(cells)
    ]
    return "Another seed (of the generated text and of its order):\n\n" + "\n".join(lines) if lines else ""


def _accuracies_by_pairs(accuracies: Mapping[str, Cell]) -> str:
    """Return a table of LLM-QAT's zero-shot average minus that of every other method with the same quantization, one by
    one and together."""
    rows = _rivals(accuracies)
    if not rows:
        return ""
    first = next(iter(accuracies.values()))
    counts = {task: score["documents"] for task, score in first["tasks"].items()}
    usual = statistics.mode(counts.values())
    others = "".join(f", {count} of {task}" for task, count in counts.items() if count != usual)
    text = f"Accuracies are of {usual} documents of each task{others}. By pairs of documents, LLM-QAT's differ by:"
    head = ["zero-shot average, points", *(f"less {LABELS[method]}" for method in _RIVALS)]
    lines = [[name, *(_points(accuracy_difference(p)) if p else "" for p in row)] for name, row in rows.items()]
    old = _in_floats([*accuracies], accuracies, "cells' accuracies")
    return "\n\n".join(filter(None, [text, table(head, lines), _measured_on(accuracies.values()), old]))


def _flips_by_pairs(accuracies: Mapping[str, Cell]) -> str:
    """Return a table of the share of documents on which LLM-QAT flips minus that of every post-training method with the
    same quantization, one by one and together."""
    teacher = next((cell for cell in accuracies.values() if cell["method"] == "full_precision"), None)
    rows = _rivals(accuracies)
    if not rows or teacher is None:
        return ""
    head = ["flips, points", *(f"less {LABELS[method]}" for method in _PTQ)]
    lines = []
    for name, (_, *row) in rows.items():
        found = (flip_difference(pairs, teacher) if pairs else None for pairs in row)
        lines.append([name, *("" if difference is None else _points(difference) for difference in found)])
    return f"By pairs of documents, LLM-QAT's share differs by:\n\n{table(head, lines)}"


_RIVALS = ("full_precision", *_PTQ)


def _rivals(accuracies: Mapping[str, Cell]) -> dict[str, list[list[tuple[Cell, Cell]]]]:
    """Return, for each cell of LLM-QAT, its pairs with each of the rivals, of which there may be none; and for all of
    them, if they are several."""
    first = next(iter(accuracies.values()), None)
    if first is None:
        return {}
    comparable = {name: c for name, c in accuracies.items() if c["settings"]["limit"] == first["settings"]["limit"]}
    rows = {
        name: [[(cell, other)] if (other := counterpart(cell, method, comparable)) else [] for method in _RIVALS]
        for name, cell in comparable.items()
        if cell["method"] == "qat"
    }
    if len(rows) > 1:
        rows["all of these"] = [[*itertools.chain(*column)] for column in zip(*rows.values(), strict=True)]
    return rows


def _measured_on(cells: Iterable[Cell]) -> str:
    """Name the machines and arithmetics of the quantized cells among ``cells``; nothing if they are the same for
    all."""
    ways = {
        f"{cell['machine'].partition(',')[0]} ({arithmetic})"
        for cell in cells
        if cell["method"] != "full_precision"
        for arithmetic in _arithmetics(cell)
    }
    if len(ways) < 2:
        return ""
    return (
        f"They were not all measured alike: {'; '.join(sorted(ways))}. That moves quantized models a little: "
        "[what rounding alone changes](../evaluation.md#what-rounding-alone-changes)."
    )


def _in_floats(names: list[str], cells: Mapping[str, Cell], what: str) -> str:
    """Name the cells that were measured with float matmuls, where today's are of codes; ``what`` of them was."""
    old = [name for name in names if _multiplies_codes(cells[name]) and _multiplied_floats(cells[name])]
    if not old:
        return ""
    return (
        f"{len(old)} {what} were measured with float matmuls, where layers multiply codes today "
        f"([what that changes](../evaluation.md#what-rounding-alone-changes)): {', '.join(old)}."
    )


def _multiplies_codes(cell: Cell) -> bool:
    names = {field.name for field in fields(QuantConfig)} & cell["settings"].keys()
    quant = QuantConfig(**{name: cell["settings"][name] for name in names})
    return can_multiply_codes(quant.weights, quant.activations)


def _multiplied_floats(cell: Cell) -> bool:
    return "floats" in _arithmetics(cell)


def _arithmetics(cell: Cell) -> set[str]:
    """Return the arithmetics of a cell; each task of an early cell was measured with whichever was faster."""
    return {cell["arithmetic"]} if "arithmetic" in cell else {*cell.get("products", {"": "floats"}).values()}


def _points(difference: Difference) -> str:
    text = f"{difference.mean:+.1f} ± {difference.stderr:.1f}"
    return f"**{text}**" if difference.sure else text


def _table(names: list[str], cells: Mapping[str, Cell], accuracies: Mapping[str, Cell]) -> str:
    texts = list(cells[names[0]]["texts"]) if names else []
    head = ["method", "W-A-KV", "settings", *(f"ppl {t}" for t in texts), *(f"KL {t}" for t in texts), "closed"]
    with_top1 = any(score.get("top1") is not None for name in names for score in cells[name]["texts"].values())
    head += [
        f"{measure} {text}" for measure in ("KL, 1 in 100 above,", "same top token,") for text in texts
    ] * with_top1
    with_accuracy = any(name in accuracies for name in names)
    head += ["zero-shot average", "MMLU", "TriviaQA"] * with_accuracy
    lines = [" | ".join(head), "|".join("-" * len(head))]
    for name in names:
        cell = cells[name]
        scores = [cell["texts"][text] for text in texts]
        row = [label(cell["method"]), cell["bits"], ", ".join(cell["changes"])]
        row += [f"{score['perplexity']:.2f}" for score in scores]
        row += [f"{score['kl']:.4f} ± {score['kl_stderr']:.4f}" for score in scores]
        rtn, full = counterpart(cell, "rtn", cells), counterpart(cell, "full_precision", cells)
        closes_a_gap = rtn and full and cell["method"] not in ("rtn", "full_precision")
        row.append(" / ".join(f"{v:.0%}" for v in gap_closed(cell, rtn, full).values()) if closes_a_gap else "")  # type: ignore[arg-type]
        row += _top1_columns(scores) * with_top1
        row += _accuracy_columns(accuracies.get(name)) * with_accuracy
        lines.append(" | ".join(row))
    return "\n".join(f"| {line} |" for line in lines)


def _accuracy_columns(cell: Cell | None) -> list[str]:
    """Return zero-shot average, MMLU and TriviaQA, in points."""
    if cell is None:
        return ["", "", ""]
    values = [zero_shot_averages({"": cell}).get("")]
    for task in FEW_SHOT:
        score = cell["tasks"].get(task)
        values.append((score["accuracy"], score["stderr"]) if score else None)
    return [f"{100 * value[0]:.1f} ± {100 * value[1]:.1f}" if value else "" for value in values]


def _top1_columns(scores: list[dict[str, Any]]) -> list[str]:
    """Return the 99th percentiles of the KL and the shares of tokens with the teacher's top token; empty where an
    earlier version measured."""
    if any(score.get("top1") is None for score in scores):
        return [""] * 2 * len(scores)
    shares = [f"{score['top1']:.1%} ± {score['top1_stderr']:.1%}" for score in scores]
    return [*(f"{score['kl_p99']:.2f}" for score in scores), *shares]


def _peers(peers: Mapping[str, Any]) -> list[str]:
    """Return the section on the code that users would pick instead, by the JSON of benchmarks/peers.py."""
    if not peers:
        return []
    head = ["arm", "weights", "method", "KL", "perplexity", "tokens/s", "peak GB", "exports"]
    lines = []
    for arm in peers["arms"]:
        speed = "" if arm["tokens_per_second"] is None else f"{arm['tokens_per_second']:.0f}"
        kl = f"{arm['kl']:.4f} ± {arm['kl_stderr']:.4f}"
        figures = [kl, f"{arm['perplexity']:.2f}", speed, f"{arm['peak_gb']:.1f}"]
        lines.append([arm["name"], arm["grid"], arm["method"], *figures, arm["exports"]])
    text = (
        f"{peers['bits']}, {peers['steps']} steps of {peers['batch_size']} sequences on {peers['machine']}: the same "
        "teacher, data and schedule, each arm in a process of its own, one after the other (benchmarks/peers.py, with "
        f"{', '.join(f'{name} {version}' for name, version in peers['versions'].items())}). The peak "
        "includes the teacher, which post-training methods do not use."
    )
    return ["## Beside other code", text, table(head, lines)]
