"""Token shards: Parquet files of token ids that appear whole or not at all.

``manifest.json`` says what made them: the settings, the teacher and the tokenizer. Shard i depends on
those and on i alone, so a shard that is missing can be made by anyone, at any time.
"""

import contextlib
import fcntl
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from qat.runtime.errors import UserError, differences
from qat.runtime.files import read_json, using, writing

MANIFEST = "manifest.json"
LOCK = "lock"

_NO_SHARD = 2**40
"""The byte of the lock file that stands for all files that are no shards."""

_CHECKSUM = b"qat.tokens"
"""In a shard's metadata. Parquet's own checksums are of its pages alone, not of what says how to read them."""

SCHEMA = pa.schema(
    {
        "input_ids": pa.list_(pa.int32()),
        "start_token": pa.int32(),
        "greedy_tokens": pa.int32(),
        "finish": pa.string(),
        "surprisal": pa.float32(),
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
        surprisal: -log probability of its sampled tokens in nats, added up; None where no token was sampled
    """

    input_ids: list[int]
    start_token: int
    greedy_tokens: int
    finish: str
    surprisal: float | None = field(compare=False)


class ShardFolder:
    """A folder of shards. ``settings`` are what its content depends on."""

    def __init__(self, directory: Path):
        self.directory = directory

    def claim(self, settings: dict[str, Any]) -> None:
        """Create the folder for ``settings``, or check that it was made with the same.

        Raises UserError if it holds shards of other settings, or cannot be written to.
        """
        with writing(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
            self._lock_file = os.open(self.directory / LOCK, os.O_CREAT | os.O_RDWR, 0o666)
        with self.alone():
            if not (self.directory / MANIFEST).exists():
                if self.shards():
                    raise UserError(f"{self.directory} holds shards but no {MANIFEST}: give an empty folder.")
                self.publish(MANIFEST, json.dumps(settings, indent=2).encode() + b"\n")
        if listed := differences(self.manifest(), settings):
            raise UserError(
                f"{self.directory} was made with other settings ({listed}): give the same, or another folder."
            )

    def manifest(self) -> dict[str, Any]:
        """The settings that made the shards; raises UserError if there are none."""
        path = self.directory / MANIFEST
        if not path.is_file():
            raise UserError(f"There is no training data at {self.directory}: run launch/generate.py --output there.")
        return read_json(path)

    def path(self, index: int) -> Path:
        return self.directory / f"shard-{index:05d}.parquet"

    def shards(self) -> list[Path]:
        return sorted(self.directory.glob("shard-*.parquet"))

    def missing(self, index: int) -> bool:
        """Whether shard ``index`` has to be made: it is not there, or cannot be read to its end."""
        if not self.path(index).exists():
            return True
        try:
            _read(self.path(index), SCHEMA.names)
        except UserError:
            return True
        return False

    @contextlib.contextmanager
    def claimed(self, index: int) -> Iterator[bool]:
        """Whether shard ``index`` is this process's to make: no other one is at it. A claim ends with its process.

        The claims are locks on the bytes of one file, byte i for shard i.
        """
        try:
            fcntl.lockf(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, index)
        except (BlockingIOError, PermissionError):  # POSIX allows both
            yield False
            return
        try:
            yield True
        finally:
            fcntl.lockf(self._lock_file, fcntl.LOCK_UN, 1, index)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Wait until no other process is about to write files that are no shards."""
        with writing(self.directory):  # not on a file system without POSIX locks
            fcntl.lockf(self._lock_file, fcntl.LOCK_EX, 1, _NO_SHARD)
        try:
            yield
        finally:
            fcntl.lockf(self._lock_file, fcntl.LOCK_UN, 1, _NO_SHARD)

    def write(self, index: int, sequences: Iterable[Sequence]) -> None:
        """Write shard ``index``, which must be claimed."""
        table = pa.Table.from_pylist([asdict(sequence) for sequence in sequences], schema=SCHEMA)
        table = table.replace_schema_metadata({_CHECKSUM: _checksum(table["input_ids"], self.path(index))})
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
        self.publish(self.path(index).name, sink.getvalue().to_pybytes())

    def publish(self, name: str, content: bytes) -> None:
        """A file that appears whole: written beside, flushed to disk, renamed.

        Whoever holds the claim, or is alone, is the only one to write this name; so what a kill leaves behind can
        have a fixed name, and is written over.
        """
        partial = self.directory / f".{name}.partial"
        with writing(self.directory):
            try:
                with partial.open("wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                partial.replace(self.directory / name)
            except OSError:
                partial.unlink(missing_ok=True)
                raise

    def sequences(self) -> pa.ChunkedArray:
        """All sequences' token ids, in order; raises UserError if one is missing, or a shard is damaged."""
        with using(self.directory / MANIFEST):
            expected = int(self.manifest()["sequences"])
        sequences = self.table(["input_ids"]).column("input_ids")
        if len(sequences) != expected:
            raise UserError(
                f"{self.directory} holds {len(sequences)} of its {expected} sequences: let launch/generate.py finish."
            )
        return sequences

    def table(self, columns: list[str]) -> pa.Table:
        """These columns of all shards that are there; raises UserError if one is damaged."""
        parts = [_read(file, columns) for file in self.shards()]
        return pa.concat_tables(parts) if parts else SCHEMA.empty_table().select(columns)


def _read(file: Path, columns: list[str]) -> pa.Table:
    try:
        table = pq.read_table(file, columns=columns, schema=SCHEMA, page_checksum_verification=True)
        expected = (pq.read_metadata(file).metadata or {}).get(_CHECKSUM)  # the first version wrote none
        if expected and "input_ids" in columns and _checksum(table["input_ids"], file) != expected:
            raise ValueError("its tokens are not those that were written under its name")
        return table
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{file} is damaged ({error}): run launch/generate.py again, which makes it anew.") from error


def _checksum(sequences: pa.ChunkedArray, file: Path) -> bytes:
    """Of a shard's token ids and its name."""
    crc = zlib.crc32(file.name.encode())
    for part in (pc.list_value_length(sequences), pc.list_flatten(sequences)):
        crc = zlib.crc32(part.to_numpy().astype("<i4").tobytes(), crc)
    return b"%08x" % crc
