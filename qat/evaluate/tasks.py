"""The paper's tasks: their names and metrics, and their average. qat.evaluate.harness runs them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qat.runtime.errors import UserError

ZERO_SHOT = {
    "boolq": "acc",
    "piqa": "acc_norm",
    "social_iqa": "acc",
    "hellaswag": "acc_norm",
    "winogrande": "acc",
    "arc_easy": "acc_norm",
    "arc_challenge": "acc_norm",
    "openbookqa": "acc_mutual_info",
}
"""The paper's zero-shot tasks, and the metric reported for each, as in the LLaMA paper: the likelihood of an answer
divided by its length where the harness has that; for OBQA divided by its likelihood without the question, which the
harness computes only on request."""

FEW_SHOT = {"mmlu": "acc", "triviaqa": "exact_match"}
"""The paper's 5-shot tasks."""

METRICS = ZERO_SHOT | FEW_SHOT
PAPER = "paper"
"""The name that stands for all of them."""


def task_names(listed: str) -> list[str]:
    """Return the tasks of a comma-separated list; raise UserError for an unknown one."""
    entries = listed.split(",") if listed else []
    names = [name for entry in entries for name in (METRICS if entry == PAPER else [entry])]
    if unknown := [name for name in names if name not in METRICS]:
        raise UserError(f"tasks={unknown[0]!r} is invalid: choose {PAPER}, or some of {', '.join(METRICS)}.")
    return list(dict.fromkeys(names))


def zero_shot_average(scores: Mapping[str, Mapping[str, Any]]) -> tuple[float, float]:
    """Return the mean accuracy of the zero-shot tasks and its standard error, from their scores as dictionaries."""
    own = [scores[name] for name in ZERO_SHOT]
    squares = sum(score["stderr"] ** 2 for score in own)
    return sum(score["accuracy"] for score in own) / len(own), math.sqrt(squares) / len(own)


@dataclass(frozen=True)
class Flips:
    """How many answers to a task's documents differ between two models.

    Args:
        documents: number of documents
        lost: number that were right before and are wrong now
        gained: number that were wrong before and are right now
        changed: number of different answers, right or wrong; None if one model's answers were not recorded
    """

    documents: int
    lost: int
    gained: int
    changed: int | None

    @classmethod
    def of(cls, before: Mapping[str, Any], now: Mapping[str, Any]) -> "Flips":
        """Compare two scores of a task, as dictionaries; raise UserError if they are not of the same documents."""
        if len(before["correct"]) != len(now["correct"]):
            raise UserError(
                f"One result has {len(before['correct'])} documents, the other {len(now['correct'])}: measure both "
                "with the same --limit."
            )
        pairs = list(zip(before["correct"], now["correct"], strict=True))
        answers = [score.get("answers") for score in (before, now)]  # earlier versions did not record them
        changed = sum(a != b for a, b in zip(*answers, strict=True)) if all(answers) else None
        return cls(len(pairs), pairs.count(("1", "0")), pairs.count(("0", "1")), changed)

    def __str__(self) -> str:
        flipped = self.lost + self.gained
        text = f"{flipped} of {self.documents} flip ({self.lost} become wrong, {self.gained} right)"
        return text if self.changed is None else f"{text}, {self.changed} answers change"
