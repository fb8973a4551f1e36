"""The teacher's predictions on disk: training then runs without a teacher.

A folder of ``targets-*.safetensors``, each for some consecutive sequences of a shard folder, in one of two forms:

* the k most likely tokens of every position: ``ids`` int32 [tokens, k] and ``log_probabilities`` fp16 [tokens, k],
  6 k bytes per token; ``Loss.top_k`` defines the treatment of the rest;
* the final hidden states: ``hidden`` [tokens, hidden] in the dtype that the teacher computes in, and its output weight
  once, in ``head.safetensors``. Nothing is lost.

``offsets`` int64 gives the start of each sequence. A file appears complete, with a checksum beside it, and
``manifest.json`` records what made it.
"""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from qat.data.sequences import Row, Sample
from qat.runtime.checksums import appearing_with_checksum, damage
from qat.runtime.errors import UserError, differences
from qat.runtime.files import MANIFEST, load_tensors, lock, read_json, save_tensors, write_atomically, writing
from qat.runtime.machine import send
from qat.train.distill import CHUNK_TOKENS, TeacherTargets, TopKTargets
from qat.train.losses import LOSSES

SEQUENCES_PER_FILE = 256

_HEAD = "head.safetensors"


class TeacherCache:
    """The folder of a cache. Its content depends only on ``settings``: the teacher, the data, and ``top_k``.

    Args:
        loss: the name in LOSSES of what is computed from the targets that are read
    """

    def __init__(self, directory: Path, loss: str = "logits"):
        self.directory, self.loss = directory, loss
        self._head: Tensor | None = None

    def reserve(self, settings: dict[str, object]) -> None:
        """Keep other processes out of the folder until this one ends; raise UserError if another one is in it, or it
        was made with other settings."""
        lock(self.directory)
        if (self.directory / MANIFEST).exists():
            self.check(settings)

    def record(self, settings: dict[str, object]) -> None:
        """Create the folder for ``settings``, or check that it was made with the same; raise UserError if it was
        not."""
        path = self.directory / MANIFEST
        if not path.exists():
            with writing(self.directory):
                self.directory.mkdir(parents=True, exist_ok=True)
                write_atomically(path, json.dumps(settings, indent=2) + "\n")
        self.check(settings)

    def check(self, settings: dict[str, object]) -> None:
        """Raise UserError unless the folder was made with ``settings``."""
        path = self.directory / MANIFEST
        if not path.is_file():
            raise UserError(
                f"There is no teacher cache at {self.directory}: run launch/cache_teacher.py --output there."
            )
        made_with = self.fingerprint()
        if listed := differences({key: made_with.get(key) for key in settings}, settings):
            raise UserError(f"{self.directory} was made with other settings ({listed}): make a cache for these.")

    def check_loss(self) -> None:
        """Raise UserError if the folder keeps only the most likely tokens, and the loss needs all of them."""
        if (top_k := self.fingerprint()["top_k"]) and not LOSSES[self.loss].takes_top_k:
            raise UserError(
                f"loss={self.loss} needs the teacher's full distribution, but {self.directory} has only its {top_k} "
                "most likely tokens: make a cache with launch/cache_teacher.py --top_k 0."
            )

    def fingerprint(self) -> dict[str, object]:
        """Return the settings that the folder was made with."""
        return read_json(self.directory / MANIFEST)

    def path(self, number: int) -> Path:
        """Return the path of the file with sequences ``number * SEQUENCES_PER_FILE`` and following."""
        return self.directory / f"targets-{number:05d}.safetensors"

    def missing(self, sequences: int) -> list[int]:
        """Return the numbers of the files that are missing or damaged in a folder of ``sequences`` sequences."""
        return [number for number in range(_files(sequences)) if self.lacks(number)]

    def lacks(self, number: int) -> bool:
        """Return whether file ``number`` is missing or damaged."""
        return bool(_fault(self.path(number)))

    def check_complete(self, sequences: int, rank: int = 0, ranks: int = 1) -> None:
        """Raise UserError if a folder of ``sequences`` sequences lacks a file, or one is damaged.

        All files are read, once: of ``ranks`` that share them, those of ``rank``.
        """
        files = [self.path(number) for number in range(_files(sequences))]
        files += [self.directory / _HEAD] if self.fingerprint().get("top_k") == 0 else []
        for file in files[rank::ranks]:
            if fault := _fault(file):
                raise UserError(
                    f"{self.directory} is incomplete or damaged ({file.name}: {fault}): run launch/cache_teacher.py "
                    "again, which recreates it."
                )

    def write(self, number: int, entries: list[dict[str, Tensor]]) -> None:
        """Write file ``number``: one dictionary of tensors [tokens, ...] for each of its sequences."""
        lengths = torch.tensor([0] + [len(next(iter(entry.values()))) for entry in entries])
        tensors = {name: torch.cat([entry[name] for entry in entries]) for name in entries[0]}
        self._save({"offsets": lengths.cumsum(0), **tensors}, self.path(number))

    def write_head(self, weight: Tensor) -> None:
        """Write the teacher's output weight [vocabulary, hidden], which hidden states need."""
        self._save({"weight": weight.detach().cpu().contiguous()}, self.directory / _HEAD)

    def __call__(self, row: Row) -> TeacherTargets | TopKTargets:
        """Load the teacher's targets for samples of the data, onto their device."""
        entries, device = [self._entry(sample) for sample in row.samples], row.input_ids.device
        joined = {name: send(torch.cat([entry[name] for entry in entries]), device) for name in entries[0]}
        loss, lengths = LOSSES[self.loss], row.predicted
        if "ids" in joined:
            return TopKTargets(joined["ids"], joined["log_probabilities"], loss, lengths)
        if self._head is None:
            self._head = load_tensors(self.directory / _HEAD)["weight"].to(device)
        return TeacherTargets(joined["hidden"], self._head, loss, lengths=lengths)

    def _entry(self, sample: Sample) -> dict[str, Tensor]:
        """Load what the cache has of a sample."""
        number, position = divmod(sample.sequence, SEQUENCES_PER_FILE)
        path = self.path(number)
        with safe_open(path, framework="pt") as file:
            first, last = file.get_slice("offsets")[position : position + 2].tolist()
            entry = {name: file.get_slice(name)[first:last] for name in file.keys() if name != "offsets"}  # noqa: SIM118
        if last - first != sample.input_ids.shape[1] - 1:
            raise UserError(
                f"{path} was made from other data, as sequence {sample.sequence} has another length: give the cache of "
                "this data."
            )
        return entry

    def _save(self, tensors: dict[str, Tensor], path: Path) -> None:
        with writing(self.directory), appearing_with_checksum(path) as partial:
            save_tensors(tensors, partial)


def _files(sequences: int) -> int:
    """Return the number of files that hold the targets of ``sequences`` sequences."""
    return -(-sequences // SEQUENCES_PER_FILE)


def _fault(file: Path) -> str:
    """Describe the fault of a file; return "" if there is none."""
    return damage(file) if file.is_file() else "it is missing"


def entry_of(targets: TeacherTargets, top_k: int) -> dict[str, Tensor]:
    """Return what a cache keeps of one sequence: the ``top_k`` most likely tokens, or, for 0, the final hidden
    states."""
    if top_k == 0:
        return {"hidden": targets.hidden.cpu().clone()}
    chunks = [most_likely(logits, top_k) for logits in targets.logits(CHUNK_TOKENS[targets.hidden.device.type])]
    return {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}


def most_likely(logits: Tensor, top_k: int) -> dict[str, Tensor]:
    """Return what a cache keeps of the predictions with these logits [tokens, vocabulary], on the CPU."""
    top = torch.log_softmax(logits, -1, dtype=torch.float32).topk(top_k, -1)
    return {"ids": top.indices.int().cpu(), "log_probabilities": top.values.half().cpu()}


class Observed:
    """The ``top_k`` most likely tokens at the positions of ``sequences`` sequences, as decoding comes to them."""

    def __init__(self, sequences: int, max_length: int, top_k: int):
        self._top_k = top_k
        shape = (sequences, max_length - 1, top_k)  # what no sequence reaches is never touched, and takes no memory
        self._kept = {"ids": torch.empty(shape, dtype=torch.int32)}
        self._kept |= {"log_probabilities": torch.empty(shape, dtype=torch.float16)}

    def keep(self, logits: Tensor, sequence: Tensor, position: Tensor) -> None:
        """Keep the predictions with logits [some, vocabulary] of some sequences [some] at their positions [some]."""
        for name, values in most_likely(logits, self._top_k).items():
            self._kept[name][sequence, position] = values

    def entries(self, lengths: list[int]) -> list[dict[str, Tensor]]:
        """Return what a cache keeps of each sequence; ``lengths`` are their numbers of tokens."""
        return [
            {name: values[place, : length - 1] for name, values in self._kept.items()}
            for place, length in enumerate(lengths)
        ]
