"""Training sequences from real text, in the same shards: the paper compares the generated data with them.

The documents are tokenized, joined by the end-of-text token if the tokenizer has one, and cut into sequences of equal
length; each begins with BOS if the tokenizer adds one.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from array import array
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from qat.runtime import progress
from qat.runtime.errors import UserError
from qat.runtime.files import utf8, writing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

HUB = {
    "wikitext": ("Salesforce/wikitext", "wikitext-2-raw-v1"),
    "c4": ("allenai/c4", "en"),
}
"""Corpora by name, and where they are on the hub; the training split is read."""

_FIELD = "text"
_BLOCK = 2**20
"""Characters of a piece of plain text, which is cut at the end of a line; and of the pieces that are tokenized
together."""

Piece = tuple[str, bool]
"""Text that can be tokenized independently, and whether a document ends with it."""


class Corpus:
    """The documents of ``source``: a txt, jsonl or parquet file, a folder of such files, or a name in HUB."""

    def __init__(self, source: str):
        """Raise UserError if there are no documents."""
        self.source = source
        self.files = [] if source in HUB else _files(Path(source))

    def fingerprint(self) -> str:
        """Return an identifier of the text: a hash of all of it, or its name on the hub."""
        if not self.files:
            return "/".join(HUB[self.source])
        digest = hashlib.sha256()
        for file in self.files:
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        return digest.hexdigest()[:16]

    def pieces(self) -> Iterator[Piece]:
        """Yield the documents, piece by piece; those without text are skipped."""
        if self.files:
            for file in self.files:
                yield from _READERS[file.suffix](file)
        else:
            yield from _from_hub(*HUB[self.source])

    def rows(self, tokenizer: Tokenizer, prefix: list[int], count: int, length: int) -> np.ndarray:
        """Return the token ids [count, length] of the first sequences; raise UserError if the corpus has fewer.

        They are in an unnamed file, 4 bytes per token, so that the memory does not grow with ``count``.
        """
        rows = islice(_cut(_tokens(self.pieces(), tokenizer), prefix, length), count)
        with tempfile.TemporaryFile() as file:
            with progress.bar(desc="tokenize", total=count, unit="seq") as bar:
                for row in rows:
                    with writing(Path(tempfile.gettempdir())):
                        file.write(array("i", row))
                    bar.update()
            if bar.n < count:
                advice = f"give --sequences {bar.n} or less" if bar.n else "give more text, or a smaller --max_length"
                raise UserError(
                    f"{self.source} yields only {bar.n} sequences of {length} tokens, not {count}: {advice}."
                )
            with writing(Path(tempfile.gettempdir())):
                file.flush()
            return np.memmap(file, np.int32, "r", shape=(count, length))


def _tokens(pieces: Iterator[Piece], tokenizer: Tokenizer) -> Iterator[list[int]]:
    """Yield token ids, piece by piece, with the end-of-text token, if there is one, after each document."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for batch in _batches(pieces):
        ids = tokenizer([text for text, _ in batch], add_special_tokens=False, verbose=False).input_ids
        for own, (_, ends) in zip(ids, batch, strict=True):
            yield own + end if ends else own


def _batches(pieces: Iterator[Piece]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece[0])
        if size >= _BLOCK:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _cut(tokens: Iterable[list[int]], prefix: list[int], length: int) -> Iterator[list[int]]:
    buffer: list[int] = []
    size = length - len(prefix)
    for ids in tokens:
        buffer += ids
        whole = len(buffer) // size * size
        for start in range(0, whole, size):
            yield [*prefix, *buffer[start : start + size]]
        del buffer[:whole]


def _files(path: Path) -> list[Path]:
    known = ", ".join(_READERS)
    if not path.exists():
        raise UserError(f"There is no corpus at {path}: give a file ({known}), a folder of them, or {', '.join(HUB)}.")
    files = sorted(file for file in path.rglob("*") if file.suffix in _READERS) if path.is_dir() else [path]
    if not files or files[0].suffix not in _READERS:
        raise UserError(f"{path} contains no readable text: give files that end in {known}.")
    return files


def _from_txt(file: Path) -> Iterator[Piece]:
    """Yield a text file as one document, in pieces."""
    with utf8(file) as stream:
        block = stream.read(_BLOCK) + stream.readline()
        while block:
            following = stream.read(_BLOCK) + stream.readline()
            yield block, not following
            block = following


def _from_jsonl(file: Path) -> Iterator[Piece]:
    """Yield each line as a document: an object with the field "text"."""
    with utf8(file) as stream:
        for number, line in enumerate(stream, start=1):
            try:
                yield from _document(json.loads(line)[_FIELD])
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f'{file}, line {number}, is not an object with the field "{_FIELD}" ({error}): fix it.'
                ) from error


def _from_parquet(file: Path) -> Iterator[Piece]:
    """Yield each row as a document: the value of the column "text"."""
    row = 0
    try:
        with pq.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=1024, columns=[_FIELD]):
                for value in batch.column(_FIELD):
                    row += 1
                    yield from _document("" if (text := value.as_py()) is None else text)
    except UnicodeDecodeError as error:
        raise UserError(f"{file}, row {row}, is not UTF-8 text ({error.reason}): convert it.") from error
    except (pa.ArrowException, OSError, KeyError, TypeError) as error:
        raise UserError(f'{file} cannot be read as Parquet with a column "{_FIELD}" ({error}): fix it.') from error


def _document(text: Any) -> list[Piece]:
    """Return a short document as one piece, an empty one as none; raise TypeError if it is not a string."""
    if not isinstance(text, str):
        raise TypeError(f"{_FIELD} is no string")
    return [(text, True)] if text else []


_READERS = {".txt": _from_txt, ".jsonl": _from_jsonl, ".parquet": _from_parquet}


def _from_hub(repository: str, configuration: str) -> Iterator[Piece]:
    from datasets import load_dataset  # slow to import, rarely needed

    try:
        for row in load_dataset(repository, configuration, split="train", streaming=True):
            yield from _document(row[_FIELD] or "")
    except (OSError, ValueError) as error:  # the hub cannot be reached, or has no such data set
        reason = str(error).strip().splitlines()
        raise UserError(
            f"Cannot fetch {repository} from the hub ({reason[0] if reason else type(error).__name__}): give a file or "
            "a folder of text instead."
        ) from error
