"""Token shards: Parquet files of token ids that appear complete or not at all, each with a checksum beside it.

``manifest.json`` records what made them: the settings, the teacher and the tokenizer. Shard i depends on those and on i
alone, so a missing shard can be made by any process, at any time.
"""

import contextlib
import fcntl
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from qat.runtime.checksums import appearing_with_checksum, damage
from qat.runtime.errors import UserError, differences
from qat.runtime.files import MANIFEST, appearing, locking, open_lock, read_json, using, writing

_SHARD = re.compile(r"shard-\d{5,}\.parquet")

_NO_SHARD = 2**40
"""The byte of the lock file that stands for all files that are not shards."""

SCHEMA = pa.schema(
    {
        "input_ids": pa.list_(pa.int32()),
        "start_token": pa.int32(),
        "greedy_tokens": pa.int32(),
        "finish": pa.string(),
        "surprisal": pa.float32(),
        "chosen": pa.list_(pa.bool_()),
    }
)

_OF_DIALOGUES = "chosen"
"""The column that shards without dialogues lack; it is read as empty."""


@dataclass(frozen=True)
class Sequence:
    """One training sequence.

    Args:
        input_ids: the tokens, BOS included where the tokenizer puts one
        start_token: the token that the sequence was started with; None for a dialogue
        greedy_tokens: how many tokens after it were taken greedily
        finish: "eos" or "length"
        surprisal: -log probability of its sampled tokens in nats, added up; None where no token was sampled
        chosen: of a dialogue, which tokens the model chose: the others are of the chat template, or of a prompt
    """

    input_ids: list[int]
    start_token: int | None
    greedy_tokens: int
    finish: str
    surprisal: float | None = field(compare=False)
    chosen: list[bool] | None = None


class ShardFolder:
    """A folder of shards. Its content depends only on ``settings``."""

    def __init__(self, directory: Path):
        self.directory = directory

    def begin(self, settings: dict[str, Any]) -> None:
        """Create the folder for ``settings``, or check that it was made with the same.

        Raises UserError if it holds shards of other settings, or cannot be written to.
        """
        self._lock_file = open_lock(self.directory)
        with self.alone():
            if self.is_new:
                if any(_SHARD.fullmatch(path.name) for path in self.directory.iterdir()):
                    raise UserError(f"{self.directory} holds shards but no {MANIFEST}: give an empty folder.")
                self.publish(MANIFEST, json.dumps(settings, indent=2).encode() + b"\n")
        if listed := differences(self.manifest(), settings):
            raise UserError(
                f"{self.directory} was made with other settings ({listed}): give the same, or another folder."
            )

    @property
    def is_new(self) -> bool:
        """Return whether the folder has no settings yet."""
        return not (self.directory / MANIFEST).exists()

    def manifest(self) -> dict[str, Any]:
        """Return the settings that made the shards; raise UserError if there are none."""
        path = self.directory / MANIFEST
        if not path.is_file():
            raise UserError(f"There is no training data at {self.directory}: run launch/generate.py --output there.")
        return read_json(path)

    def fingerprint(self) -> str:
        """Return an identifier that is equal for folders made from the same settings, teacher and tokenizer."""
        return hashlib.sha256(json.dumps(self.manifest(), sort_keys=True).encode()).hexdigest()[:16]

    def path(self, index: int) -> Path:
        """Return the path of a shard, which may not be there."""
        return self.directory / f"shard-{index:05d}.parquet"

    def shards(self) -> list[Path]:
        """Return the existing shards, in order. Other files, whatever their names, are not counted."""
        return [self.path(index) for index in self._there()]

    def _there(self) -> list[int]:
        manifest = self.manifest()
        count = -(-manifest["sequences"] // manifest["sequences_per_shard"])
        return [index for index in range(count) if self.path(index).is_file()]

    def missing(self, index: int) -> bool:
        """Return whether shard ``index`` has to be made: it does not exist, is damaged, or is another shard under its
        name."""
        if not self.path(index).is_file():
            return True
        try:
            self._read(index, SCHEMA.names)
        except UserError:
            return True
        return False

    @contextlib.contextmanager
    def claimed(self, index: int) -> Iterator[bool]:
        """Try to claim shard ``index``, and yield whether this process has it: False if another one does. A claim ends
        with its process.

        The claims are locks on the bytes of one file, byte i for shard i.
        """
        try:
            with locking(self.directory):
                fcntl.lockf(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, index)
        except (BlockingIOError, PermissionError):  # POSIX allows either error
            yield False
            return
        try:
            yield True
        finally:
            fcntl.lockf(self._lock_file, fcntl.LOCK_UN, 1, index)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the exclusive lock for writing files other than shards; wait for it if another process holds it."""
        with locking(self.directory):
            fcntl.lockf(self._lock_file, fcntl.LOCK_EX, 1, _NO_SHARD)
        try:
            yield
        finally:
            fcntl.lockf(self._lock_file, fcntl.LOCK_UN, 1, _NO_SHARD)

    def write(self, index: int, sequences: Iterable[Sequence]) -> None:
        """Write shard ``index``, which must be claimed."""
        table = pa.Table.from_pylist([asdict(sequence) for sequence in sequences], schema=SCHEMA)
        if table.column(_OF_DIALOGUES).null_count == len(table):
            table = table.drop_columns(_OF_DIALOGUES)
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
        with writing(self.directory), appearing_with_checksum(self.path(index)) as partial:
            partial.write_bytes(sink.getvalue())

    def publish(self, name: str, content: bytes) -> None:
        """Write a file that appears complete; the caller must hold ``alone``."""
        with writing(self.directory), appearing(self.directory / name) as partial:
            partial.write_bytes(content)

    def sequences(self) -> pa.ChunkedArray:
        """Return all sequences' token ids, in order; raise UserError if a shard is missing or damaged."""
        with using(self.directory / MANIFEST):
            expected = int(self.manifest()["sequences"])
        sequences = self.table(["input_ids"]).column("input_ids")
        if len(sequences) != expected:
            raise UserError(
                f"{self.directory} holds {len(sequences)} of its {expected} sequences: let launch/generate.py finish."
            )
        return sequences

    def table(self, columns: list[str]) -> pa.Table:
        """Return these columns of all existing shards; raise UserError if one is damaged, or not in its place."""
        parts = [self._read(index, columns) for index in self._there()]
        return pa.concat_tables(parts) if parts else SCHEMA.empty_table().select(columns)

    def _read(self, index: int, columns: list[str]) -> pa.Table:
        file, manifest = self.path(index), self.manifest()
        first = index * manifest["sequences_per_shard"]
        count = min(manifest["sequences_per_shard"], manifest["sequences"] - first)
        try:
            if not (reason := damage(file)):
                with file.open("rb") as stream:  # given a path, pyarrow would expand "~"
                    table = pq.read_table(stream, columns=columns, schema=SCHEMA, page_checksum_verification=True)
                if len(table) == count:
                    return table
                reason = f"it holds {len(table)} sequences, not {count}"
        except (pa.ArrowException, OSError, ValueError) as error:
            reason = str(error)
        raise UserError(f"{file} is damaged ({reason}): run launch/generate.py again, which recreates it.")
