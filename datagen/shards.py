"""Token shards: Parquet files of token ids that appear whole or not at all.

``manifest.json`` says what made them: the settings, the teacher and the tokenizer. Shard i depends on
those and on i alone, so a shard that is missing can be made by anyone, at any time.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from qat.errors import UserError, differences
from qat.files import write_atomically

MANIFEST = "manifest.json"

SCHEMA = pa.schema(
    {
        "input_ids": pa.list_(pa.int32()),
        "start_token": pa.int32(),
        "greedy_tokens": pa.int32(),
        "finish": pa.string(),
    }
)


@dataclass(frozen=True)
class Sequence:
    """One training sequence.

    Args:
        input_ids: the tokens, BOS included where the tokenizer puts one
        start_token: the token that the sequence was started with
        greedy_tokens: how many tokens after it were taken greedily
        finish: "eos" or "length"
    """

    input_ids: list[int]
    start_token: int
    greedy_tokens: int
    finish: str


class ShardFolder:
    """A folder of shards. ``settings`` are what its content depends on."""

    def __init__(self, directory: Path):
        self.directory = directory

    def claim(self, settings: dict[str, Any]) -> None:
        """Create the folder for ``settings``, or check that it was made with the same.

        Raises UserError if it holds shards of other settings.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        if not (self.directory / MANIFEST).exists():
            if self.shards():
                raise UserError(f"{self.directory} holds shards but no {MANIFEST}: give an empty folder.")
            write_atomically(self.directory / MANIFEST, json.dumps(settings, indent=2) + "\n")
            return
        if listed := differences(self.manifest(), settings):
            raise UserError(
                f"{self.directory} was made with other settings ({listed}): give the same, or another folder."
            )

    def manifest(self) -> dict[str, Any]:
        """The settings that made the shards; raises UserError if there are none."""
        path = self.directory / MANIFEST
        if not path.is_file():
            raise UserError(f"There is no training data at {self.directory}: run launch/generate.py --output there.")
        try:
            return json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise UserError(f"{path} is damaged ({error}): make the data again in an empty folder.") from error

    def path(self, index: int) -> Path:
        return self.directory / f"shard-{index:05d}.parquet"

    def shards(self) -> list[Path]:
        return sorted(self.directory.glob("shard-*.parquet"))

    def write(self, index: int, sequences: Iterable[Sequence]) -> None:
        """Write shard ``index``: it appears under its name by an atomic rename."""
        table = pa.Table.from_pylist([asdict(sequence) for sequence in sequences], schema=SCHEMA)
        partial = self.path(index).with_suffix(f".partial-{os.getpid()}")
        pq.write_table(table, partial, compression="zstd")
        partial.replace(self.path(index))

    def sequences(self) -> pa.ChunkedArray:
        """All sequences' token ids, in order; raises UserError if one is missing, or a shard is damaged."""
        expected = self.manifest()["sequences"]
        chunks = [chunk for file in self.shards() for chunk in _read_ids(file).chunks]
        sequences = pa.chunked_array(chunks, type=SCHEMA.field("input_ids").type)
        if len(sequences) != expected:
            raise UserError(
                f"{self.directory} holds {len(sequences)} of its {expected} sequences: let launch/generate.py finish."
            )
        return sequences


def _read_ids(file: Path) -> pa.ChunkedArray:
    try:
        return pq.read_table(file, columns=["input_ids"], schema=SCHEMA).column("input_ids")
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{file} is damaged ({error}): delete it and run launch/generate.py again.") from error
