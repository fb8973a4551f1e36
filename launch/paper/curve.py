"""KL against training tokens, and the law that the points suggest.

    KL(tokens) = floor + scale * tokens^-exponent

With the floor 0 it is a line in logarithms, fitted by least squares there. Other floors can fit a few points equally
well, but change the prediction for longer runs: so both are fitted, and the prediction is a range.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launch.paper.tables import table

_FEWEST = 3
"""Least number of points of a curve."""

_FEWEST_WITH_FLOOR = 4
"""Least number of points of a law with a floor, which has three parameters."""

_FLOORS = 200
"""Number of floors that are tried, evenly from 0 to the smallest KL."""

_LENGTHS = ("steps", "decay_steps", "sequences")
"""The settings in which the points of a curve differ."""

AHEAD = (10_000_000, 100_000_000)
"""Numbers of tokens for which the law predicts the KL."""


@dataclass(frozen=True)
class Law:
    """The law; see above."""

    floor: float
    scale: float
    exponent: float

    def __call__(self, tokens: float) -> float:
        return self.floor + self.scale * tokens**-self.exponent

    @classmethod
    def of(cls, tokens: Sequence[float], kl: Sequence[float], floor: float = 0.0) -> "Law":
        """Fit scale and exponent to two or more points above ``floor``."""
        x, y = [math.log(value) for value in tokens], [math.log(value - floor) for value in kl]
        mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
        slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)
        return cls(floor, math.exp(mean_y - slope * mean_x), -slope)

    @classmethod
    def with_floor(cls, tokens: Sequence[float], kl: Sequence[float]) -> "Law":
        """Fit the floor too: the one that leaves the least error of log KL."""
        laws = [cls.of(tokens, kl, min(kl) * step / _FLOORS) for step in range(_FLOORS)]
        return min(laws, key=lambda law: law.error(tokens, kl))

    def error(self, tokens: Sequence[float], kl: Sequence[float]) -> float:
        """Return the root mean square of log(law / KL)."""
        return math.sqrt(statistics.fmean(math.log(self(t) / k) ** 2 for t, k in zip(tokens, kl, strict=True)))


@dataclass(frozen=True)
class Curve:
    """Points of one recipe: tokens and KL of one text, by tokens.

    Args:
        name: the recipe
        untrained: KL of rounding to nearest, where that was measured
    """

    name: str
    text: str
    tokens: list[int]
    kl: list[float]
    untrained: float | None

    @property
    def laws(self) -> list[Law]:
        """Return the law without a floor, and, of enough points, with one."""
        kinds = [Law.of, Law.with_floor] if len(self.tokens) >= _FEWEST_WITH_FLOOR else [Law.of]
        return [kind(self.tokens, self.kl) for kind in kinds]


def curves(cells: Mapping[str, dict[str, Any]]) -> list[Curve]:
    """Return a curve for each recipe and text with enough points among the cells whose learning rate fell at the
    end."""
    found: dict[str, list[dict[str, Any]]] = {}
    for cell in cells.values():
        if "decay_steps" in cell["settings"]:
            kept = [change for change in cell["changes"] if change.partition("=")[0] not in _LENGTHS]
            found.setdefault(f"{cell['bits']} {', '.join(kept)}", []).append(cell)
    made = []
    for name, points in found.items():
        points.sort(key=lambda cell: cell["budget"]["trained"]["tokens"])
        if len(points) < _FEWEST:
            continue
        quant = [change for change in points[0]["changes"] if change.partition("=")[0] not in (*_LENGTHS, "lr", "seed")]
        untrained = ("rtn", points[0]["bits"], quant)
        same = [cell for cell in cells.values() if (cell["method"], cell["bits"], cell["changes"]) == untrained]
        rtn = same[0]["texts"] if same else {}
        for text in points[0]["texts"]:
            tokens = [cell["budget"]["trained"]["tokens"] for cell in points]
            kl = [cell["texts"][text]["kl"] for cell in points]
            made.append(Curve(name, text, tokens, kl, rtn[text]["kl"] if text in rtn else None))
    return made


def markdown(found: Sequence[Curve]) -> str:
    """Return the curves' points, the laws and what these foretell; nothing if there are no curves."""
    if not found:
        return ""
    head = ["recipe", "text", "tokens", "KL", "share of RTN's closed", "law", *(f"at {_short(n)}" for n in AHEAD)]
    lines = []
    for curve in found:
        laws = curve.laws
        closed = "" if curve.untrained is None else ", ".join(f"{1 - kl / curve.untrained:.0%}" for kl in curve.kl)
        ahead = [" to ".join(f"{law(n):.3f}" for law in laws) for n in AHEAD]
        formulas = " or ".join(f"{_formula(law)} (log error {law.error(curve.tokens, curve.kl):.3f})" for law in laws)
        points = [", ".join(map(_short, curve.tokens)), ", ".join(f"{kl:.3f}" for kl in curve.kl)]
        lines.append([curve.name, curve.text, *points, closed, formulas, *ahead])
    text = (
        "KL in nats against the tokens of the whole training, the constant part included. The law is fitted to these "
        "points, without a floor and, of four or more, with the best one; its log error is the root mean square of "
        "log(law / KL); predictions for more tokens are extrapolations."
    )
    return "\n\n".join([text, table(head, lines), "![KL against tokens](curve.png)"])


def _formula(law: Law) -> str:
    floor = f"{law.floor:.3f} + " if law.floor else ""
    return f"{floor}{law.scale:.3g} · tokens^-{law.exponent:.3f}"


def _short(number: int) -> str:
    return f"{number / 1e6:.3g}M" if number >= 1e6 else f"{number / 1e3:.3g}k"
