"""Markdown tables of the page of results."""

from collections.abc import Iterable, Sequence


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table of cells that hold their text already."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["-"] * len(head), *rows))
