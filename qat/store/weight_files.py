"""Weight files: safetensors, read one tensor at a time, written in files of bounded size."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from qat.runtime.errors import UserError
from qat.runtime.files import save_tensors, writing
from qat.store.sidecars import GRIDS_FILE, STEPS_FILE

INDEX = "model.safetensors.index.json"

NO_WEIGHTS = (STEPS_FILE, GRIDS_FILE)
"""Safetensors files of a student beside its weights."""

FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
"""Safetensors' names of the number formats that a full-precision weight may have."""

FILE_BYTES = 2 * 10**9


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: its name there, its shape, and safetensors' name of its dtype."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


def weight_files(directory: Path) -> list[Path]:
    """The files that are the model, by transformers' rule: what ``transformers_weights`` in the config names,
    ``model.safetensors``, or else what the index names. Others are not: Mistral's directories hold a second copy under
    other names.

    Raises UserError if any is missing.
    """
    config = json.loads((directory / "config.json").read_text())
    named = directory / config.get("transformers_weights", _file_name(1, 1))
    opened = named if named.is_file() else directory / INDEX
    if not opened.is_file():
        raise UserError(
            f"{directory} has no weights in the safetensors format ({named.name}, or {INDEX}): save the model so."
        )
    if opened.suffix != ".json":
        return [opened]
    try:
        names = sorted(set(json.loads(opened.read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise _damaged(opened, error) from error
    if missing := [name for name in names if not (directory / name).is_file()]:
        raise UserError(f"{directory} is incomplete: the weight file {missing[0]} is missing.")
    return [directory / name for name in names]


def stored_tensors(directory: Path) -> dict[str, Stored]:
    """What the weight files of a model hold, by the names there; only their headers are read.

    Raises UserError for a damaged file, and for a name that is there twice.
    """
    found: dict[str, Stored] = {}
    for file in weight_files(directory):
        with _opened(file) as opened:
            for name in opened.keys():  # noqa: SIM118  (not a dict)
                if name in found:
                    raise UserError(f"{directory} has {name} twice, in {found[name].file.name} and in {file.name}.")
                header = opened.get_slice(name)
                found[name] = Stored(file, name, tuple(header.get_shape()), header.get_dtype())
    return found


def read(places: Mapping[str, Stored]) -> Iterator[tuple[str, Tensor]]:
    """The tensors at ``places``, by the names given there, one at a time, file by file."""
    in_order = sorted(places.items(), key=lambda item: item[1].file)
    for file, items in groupby(in_order, key=lambda item: item[1].file):
        with _opened(file) as opened:
            for name, place in items:
                yield name, opened.get_tensor(place.name)


def write(directory: Path, tensors: Iterable[tuple[str, Tensor]], file_bytes: int = FILE_BYTES) -> None:
    """Write weight files of at most ``file_bytes`` (one tensor at least), and their index.

    One file is in memory at a time, and the tensor that comes next.
    """
    pending: dict[str, Tensor] = {}
    places: dict[str, int] = {}
    held = total = files = 0
    for name, tensor in tensors:
        if pending and held + tensor.nbytes > file_bytes:
            files += 1
            save_tensors(pending, directory / f"part-{files}")
            pending, held = {}, 0
        pending[name] = tensor.contiguous()
        places[name] = files + 1
        held += tensor.nbytes
        total += tensor.nbytes
    files += 1
    save_tensors(pending, directory / f"part-{files}")
    names = {number: _file_name(number, files) for number in range(1, files + 1)}
    index = {"metadata": {"total_size": total}, "weight_map": {name: names[number] for name, number in places.items()}}
    with writing(directory):
        for number, name in names.items():
            (directory / f"part-{number}").rename(directory / name)
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise _damaged(file, error) from error


def _damaged(file: Path, error: Exception) -> UserError:
    return UserError(f"{file} is damaged ({error}): copy it again, or write it anew.")


def _file_name(number: int, files: int) -> str:
    return "model.safetensors" if files == 1 else f"model-{number:05}-of-{files:05}.safetensors"


def weights_size(directory: Path) -> int:
    """Bytes of the weight files of a model directory."""
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))
