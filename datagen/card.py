"""The data card: describes a finished folder of shards in figures, examples and a plot."""

from __future__ import annotations

import io
from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

from qat.data.shards import SCHEMA, ShardFolder
from qat.runtime.files import MANIFEST

if TYPE_CHECKING:
    import pyarrow as pa
    from transformers import PreTrainedTokenizerBase as Tokenizer

CARD, PLOT = "README.md", "lengths.png"

_SAMPLED = 10_000
"""Number of sequences, from the first, that the n-gram figures are computed on."""

_REPEATED = 4
"""Length of the n-grams whose repetition is counted."""

_EXAMPLES, _EXAMPLE_CHARACTERS = 3, 600
_BINS = 16


def write(folder: ShardFolder, tokenizer: Tokenizer, model: str) -> bool:
    """Publish the card, and its plot if matplotlib is installed, in a folder whose shards are all present; return False
    if it has them already.

    The same shards make the same card.
    """
    if (folder.directory / CARD).exists():
        return False
    table = folder.table(SCHEMA.names)
    figures = measure(table)
    edges, counts = histogram(table, folder.manifest()["max_length"])
    examples = [str(tokenizer.decode(ids)) for ids in table.column("input_ids").slice(0, _EXAMPLES).to_pylist()]
    plotted = find_spec("matplotlib") is not None  # an extra, [plots]
    text = _card(folder.manifest(), figures, edges, counts, examples, model, plotted)
    with folder.alone():
        if (folder.directory / CARD).exists():  # another rank wrote it first
            return False
        if plotted:
            folder.publish(PLOT, _plot(edges, counts, figures["ended by EOS"]))
        folder.publish(CARD, text.encode())
    return True


def measure(table: pa.Table) -> dict[str, float]:
    """Compute the figures, by name, of sequences in a table with the columns of a shard.

    distinct-n is the number of different n-grams over the number of all; "repeated 4-grams" is the share of 4-grams
    that stood in the same sequence before. Where there are dialogues, their number is given, their share of the tokens,
    and the share of their tokens that is the chat template's or a prompt's. "token entropy" is the mean -log p(token)
    of the tokens that were sampled, which estimates the mean entropy of the distributions that they were drawn from.
    """
    ids = table.column("input_ids").combine_chunks()
    lengths = np.diff(ids.offsets.to_numpy())
    tokens = int(lengths.sum())
    finish = np.array(table.column("finish").to_pylist())
    figures: dict[str, float] = {
        "sequences": len(lengths),
        "tokens": tokens,
        "mean length": tokens / len(lengths),
        "ended by EOS": float((finish == "eos").mean()),
    }
    marks = table.column("chosen").combine_chunks()
    is_dialogue = marks.is_valid().to_numpy(zero_copy_only=False)
    chosen = np.diff(np.append(0, marks.flatten().to_numpy(zero_copy_only=False).cumsum())[marks.offsets.to_numpy()])
    if is_dialogue.any():
        of_dialogues = int(lengths[is_dialogue].sum())
        figures["dialogues"] = int(is_dialogue.sum())
        figures["tokens in dialogues"] = of_dialogues / tokens
        figures["given tokens in dialogues"] = 1 - int(chosen[is_dialogue].sum()) / of_dialogues
    flat = ids.flatten().to_numpy()[: int(lengths[:_SAMPLED].sum())]
    sequence = np.repeat(np.arange(min(len(lengths), _SAMPLED)), lengths[:_SAMPLED])
    for n in (1, 2, 3):
        grams, _ = _ngrams(flat, sequence, n)
        figures[f"distinct-{n}"] = len(np.unique(grams)) / max(len(grams), 1)
    grams, owner = _ngrams(flat, sequence, _REPEATED)
    different = len(np.unique(np.stack([owner.astype(np.uint64), grams], 1), axis=0))
    figures[f"repeated {_REPEATED}-grams"] = (len(grams) - different) / max(len(grams), 1)
    surprisal = table.column("surprisal").combine_chunks().to_numpy(zero_copy_only=False)  # None is NaN
    sampled = ~np.isnan(surprisal)
    if sampled.any():
        first = ids.flatten().to_numpy()[ids.offsets.to_numpy()[:-1]]
        started = table.column("start_token").to_numpy(zero_copy_only=False)  # None is NaN
        given = 1 + (first != started)  # the start token, with or without BOS
        count = np.where(is_dialogue, chosen, lengths - given - table.column("greedy_tokens").to_numpy())
        figures["token entropy"] = float(surprisal[sampled].sum() / count[sampled].sum())
    return figures


def histogram(table: pa.Table, max_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Return bin edges [bins + 1], in tokens, and the number of sequences per bin [bins]."""
    lengths = np.diff(table.column("input_ids").combine_chunks().offsets.to_numpy())
    edges = np.unique(np.linspace(0, max_length + 1, _BINS + 1).round().astype(int))
    return edges, np.histogram(lengths, edges)[0]


def _ngrams(flat: np.ndarray, sequence: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a 64-bit hash of each n-gram that lies within one sequence, and the index of that sequence."""
    count = max(len(flat) - n + 1, 0)
    hashes = np.zeros(count, np.uint64)
    for i in range(n):
        hashes = (hashes ^ flat[i : i + count].astype(np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
        hashes ^= hashes >> np.uint64(32)
    whole = sequence[:count] == sequence[n - 1 :]
    return hashes[whole], sequence[:count][whole]


def _card(
    manifest: Mapping[str, Any],
    figures: Mapping[str, float],
    edges: np.ndarray,
    counts: np.ndarray,
    examples: list[str],
    model: str,
    plotted: bool,
) -> str:
    source = f"the corpus `{manifest['corpus']}`" if "corpus" in manifest else f"`{model}`"
    made = "Real text, tokenized" if "corpus" in manifest else "Token sequences written by the model"
    header = ["configs:", "- config_name: default", "  data_files: shard-*.parquet"]
    rows = [f"| {name} | {_number(name, value)} |" for name, value in figures.items()]
    bins = [f"| {low} to {high - 1} | {count} |" for low, high, count in zip(edges, edges[1:], counts, strict=False)]
    texts = [f"{_fenced(text[:_EXAMPLE_CHARACTERS])}\n" for text in examples]
    columns = {
        "input_ids": "token ids, BOS included where the tokenizer puts one",
        "start_token": "the token that the sequence was started with",
        "greedy_tokens": "how many tokens after it were taken greedily",
        "finish": "`eos` or `length`",
        "surprisal": "-log probability of its sampled tokens in nats, added up; empty where none was sampled",
    }
    if "dialogues" in figures:
        columns["start_token"] += "; empty for a dialogue"
        columns["chosen"] = (
            "of a dialogue, which tokens the model chose; the others are the chat template's, or a prompt's"
        )
        begun = f"begun with a prompt from `{manifest['prompts']}`" if "prompts" in manifest else "both sides its own"
        made += f", {figures['dialogues']:,} of them dialogues, {begun}"
    return "\n".join(
        [
            "---", *header, "---", "",
            "# Training sequences for LLM-QAT", "",
            f"{made}: {source}. Made by `launch/generate.py`; the settings are in `{MANIFEST}`.", "",
            "```python",
            "import datasets", "",
            'data = datasets.load_dataset("parquet", data_files="shard-*.parquet", split="train")',
            "```", "",
            "| column | |", "|---|---|", *(f"| `{name}` | {meaning} |" for name, meaning in columns.items()), "",
            "## Figures", "",
            "| | |", "|---|---|", *rows, "",
            f"distinct-n: different n-grams over all; repeated {_REPEATED}-grams: those that stood in the same "
            f"sequence before (both of the first {_SAMPLED} sequences); token entropy: the mean of -log p(token) over "
            "the tokens that were sampled, in nats.", "",
            "## Lengths", "",
            *([f"![lengths]({PLOT})", ""] if plotted else []),
            "| tokens | sequences |", "|---|---|", *bins, "",
            "## Examples", "",
            *texts,
        ]
    )  # fmt: skip


def _number(name: str, value: float) -> str:
    if name in ("sequences", "tokens", "dialogues"):
        return f"{int(value):,}"
    if name in ("ended by EOS", f"repeated {_REPEATED}-grams", "tokens in dialogues", "given tokens in dialogues"):
        return f"{value:.1%}"
    return f"{value:.1f}" if name == "mean length" else f"{value:.3f}"


def _fenced(text: str) -> str:
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}text\n{text}\n{fence}"


def _plot(edges: np.ndarray, counts: np.ndarray, ended: float) -> bytes:
    import matplotlib as mpl  # imported here: it takes a second, and only one rank draws
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.add_subplot()
    axes.bar(edges[:-1], counts, width=np.diff(edges), align="edge", color="#2563eb", edgecolor="white")
    axes.set(xlabel="tokens", ylabel="sequences", title=f"Lengths; {ended:.0%} ended by EOS")
    axes.spines[["top", "right"]].set_visible(False)
    content = io.BytesIO()
    with mpl.rc_context({"savefig.dpi": 150}):
        figure.savefig(content, format="png", metadata={"Software": None})
    return content.getvalue()
