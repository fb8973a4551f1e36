"""Flips: answers to tasks that quantization changes, right or wrong. Accuracies hide those that cancel.

Of two models with the same accuracy, the one with fewer flips is nearer to the original (Dutta et al. 2024, arXiv
2407.09141).
"""

import math
from collections.abc import Mapping
from typing import Any

from launch.paper.tables import table
from qat.evaluate.tasks import Flips

Cell = dict[str, Any]

_TEACHER = "full_precision"


def markdown(measured: Mapping[str, Mapping[str, Cell]]) -> str:
    """Return a table of every cell's flips against full precision, on the same documents.

    Args:
        measured: for each kind of measurement, as the table calls it, what each cell measured on tasks, by name
    """
    lines = []
    for kind, cells in measured.items():
        teachers = [cell for cell in cells.values() if cell["method"] == _TEACHER]
        others = {name: cell for name, cell in cells.items() if cell["method"] != _TEACHER}
        for name, cell in others.items() if teachers else ():
            if found := _of_both(teachers[0], cell):
                lines.append(_line(kind, name, found))
    if not lines:
        return ""
    head = ["cell", "documents", "accuracy less the teacher's, points", "flips", "become wrong", "become right"]
    head.append("answers that change")
    text = (
        "Flips are documents whose answer is right by one model and wrong by the other, the teacher or the cell; "
        "± is the standard error of the share."
    )
    return f"{text}\n\n{table(head, lines)}"


def _of_both(teacher: Cell, cell: Cell) -> list[Flips]:
    """Return the flips of each task that both were measured on, with as many documents."""
    pairs = [(teacher["tasks"][task], score) for task, score in cell["tasks"].items() if task in teacher["tasks"]]
    return [Flips.of(*pair) for pair in pairs if len({len(score["correct"]) for score in pair}) == 1]


def _line(kind: str, name: str, found: list[Flips]) -> list[str]:
    """Return a row: the flips of all tasks together."""
    documents, lost, gained = (sum(getattr(own, part) for own in found) for part in ("documents", "lost", "gained"))
    flipped = (lost + gained) / documents
    gain = (gained - lost) / documents
    stderr = math.sqrt((flipped - gain**2) / documents)
    changed = [own.changed for own in found if own.changed is not None]
    return [
        name,
        f"{documents:,} ({kind})",
        f"{100 * gain:+.1f} ± {100 * stderr:.1f}",
        f"{flipped:.1%} ± {math.sqrt(flipped * (1 - flipped) / documents):.1%}",
        f"{lost / documents:.1%}",
        f"{gained / documents:.1%}",
        f"{sum(changed) / documents:.1%}" if len(changed) == len(found) else "",
    ]
