"""Training sequences from shards, in an order that depends on the seed and the sample's number alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pyarrow.compute as pc
import torch
from torch import Tensor

from qat.data.shards import ShardFolder
from qat.runtime.errors import UserError
from qat.runtime.machine import send
from qat.store.models import tokenizer_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer


class Sample(NamedTuple):
    """One training sequence: its number in the shard folder, and its token ids [1, tokens]."""

    sequence: int
    input_ids: Tensor


@dataclass(frozen=True)
class Row:
    """One or more samples, packed into one row without padding; each attends to itself alone.

    Args:
        samples: the samples, in order
        input_ids: their token ids [1, tokens of all]
    """

    samples: tuple[Sample, ...]
    input_ids: Tensor

    @classmethod
    def of(cls, *samples: Sample) -> Row:
        """Pack the samples."""
        return cls(samples, torch.cat([sample.input_ids for sample in samples], 1))

    @property
    def lengths(self) -> tuple[int, ...]:
        """Return the number of tokens of each sample."""
        return tuple(sample.input_ids.shape[1] for sample in self.samples)

    @property
    def predicted(self) -> tuple[int, ...]:
        """Return the number of predicted tokens of each sample: all but the first."""
        return tuple(length - 1 for length in self.lengths)

    def to(self, device: torch.device) -> Row:
        """Send the row to ``device``, without waiting for it."""
        return replace(self, input_ids=send(self.input_ids, device))


class TrainingData:
    """The sequences of a shard folder, reshuffled for every pass.

    Sample n of a run is the same sequence on any number of ranks.
    """

    def __init__(self, directory: Path, tokenizer: Tokenizer, seed: int):
        """Raise UserError for an empty folder, shards made with another tokenizer, and tokens without an id."""
        folder = ShardFolder(directory)
        made_with, ours = folder.manifest().get("tokenizer"), tokenizer_fingerprint(tokenizer)
        if made_with != ours:
            raise UserError(
                f"The shards in {directory} were made with another tokenizer ({made_with}) than the model's "
                f"({ours}): generate the data with the model that is trained, or give the folder made with it."
            )
        self._sequences = folder.sequences()
        self.fingerprint = folder.fingerprint()
        """Equal for folders made from the same settings, teacher and tokenizer."""
        ids, lengths = pc.list_flatten(self._sequences), pc.list_value_length(self._sequences)
        if ids.null_count or lengths.null_count or pc.min(lengths).as_py() < 1 or pc.min(ids).as_py() < 0:
            raise UserError(f"{directory} has empty sequences or invalid token ids: generate the data again.")
        self.largest = int(pc.max(ids).as_py())
        """The largest token id in the data."""
        self.longest = int(pc.max(lengths).as_py())
        """Number of tokens of the longest sequence."""
        self._seed = seed
        self._order: tuple[int, Tensor] | None = None

    def __len__(self) -> int:
        return len(self._sequences)

    def sample(self, number: int) -> Sample:
        """Return the run's sample ``number``, counted over all ranks and passes."""
        epoch, position = divmod(number, len(self))
        if self._order is None or self._order[0] != epoch:
            generator = torch.Generator().manual_seed(self._seed + epoch)
            self._order = epoch, torch.randperm(len(self), generator=generator)
        return self.sequence(int(self._order[1][position]))

    def sequence(self, index: int) -> Sample:
        """Return sequence ``index`` of the folder, in the order in which it was written."""
        return Sample(index, torch.tensor([self._sequences[index].as_py()]))
