"""Weight files: safetensors or PyTorch's, read one tensor at a time; written as safetensors of bounded size."""

import json
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from qat.runtime.errors import UserError
from qat.runtime.files import read_json, save_tensors, using, writing
from qat.store.pickles import would_run
from qat.store.sidecars import GRIDS_FILE, SCALES_FILE, STEPS_FILE

INDEX = "model.safetensors.index.json"
BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"

NO_WEIGHTS = (STEPS_FILE, GRIDS_FILE, SCALES_FILE)
"""Names of the safetensors files that a student has beside its weights."""

FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
"""Safetensors' names of the number formats that a full-precision weight may have."""

_FLOATS = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}

FILE_BYTES = 2 * 10**9


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: its name there, its shape, and safetensors' name of its dtype."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


def weight_files(directory: Path) -> list[Path]:
    """Return the files that form the model, by transformers' rule: those that ``transformers_weights`` in the config
    names, or the first that exists of ``model.safetensors``, its index, ``pytorch_model.bin`` and its index. Other
    files are ignored: Mistral's directories hold a second copy under other names.

    Raises UserError if any is missing.
    """
    named = read_json(directory / "config.json").get("transformers_weights")
    if named is not None and not re.fullmatch(r"[^/]+\.safetensors(\.index\.json)?", str(named)):
        raise UserError(
            f"The config.json of {directory} has transformers_weights={named!r}: name a file of that folder."
        )
    choices = [named] if named is not None else [file_name(1, 1), INDEX, BIN, BIN_INDEX]
    opened = next((directory / name for name in choices if (directory / name).is_file()), None)
    if opened is None:
        raise UserError(
            f"{directory} has no weights ({' or '.join(choices)}): copy them there, or save the model again."
        )
    if opened.suffix != ".json":
        return [opened]
    index = read_json(opened)
    with using(opened):
        dict(index["metadata"])  # transformers adds entries to it
        names = sorted(set(index["weight_map"].values()))
        missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise UserError(f"{directory} is incomplete: the weight file {missing[0]} is missing.")
    return [directory / name for name in names]


def stored_tensors(directory: Path) -> dict[str, Stored]:
    """Return the tensors in a model's weight files, by the names there; only their headers are read.

    Raises UserError for a damaged file, and for a name that is there twice.
    """
    found: dict[str, Stored] = {}
    for file in weight_files(directory):
        for stored in _headers(file):
            if stored.name in found:
                other = found[stored.name].file
                raise UserError(
                    f"{directory} has {stored.name} twice, in {other.name} and in {file.name}: delete one of the files."
                )
            found[stored.name] = stored
    return found


def read(places: Mapping[str, Stored]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors at ``places``, by the names given there, one at a time, file by file."""
    in_order = sorted(places.items(), key=lambda item: item[1].file)
    for file, items in groupby(in_order, key=lambda item: item[1].file):
        if file.suffix == ".bin":
            tensors = _unpickled(file)
            for name, place in items:
                yield name, tensors[place.name].clone()  # those of one file may share their memory
        else:
            with _opened(file) as opened:
                for name, place in items:
                    yield name, opened.get_tensor(place.name)


def write(directory: Path, tensors: Iterable[tuple[str, Tensor]], file_bytes: int = FILE_BYTES) -> None:
    """Write weight files of at most ``file_bytes`` (but of at least one tensor each), and their index.

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
    names = {number: file_name(number, files) for number in range(1, files + 1)}
    index = {"metadata": {"total_size": total}, "weight_map": {name: names[number] for name, number in places.items()}}
    with writing(directory):
        for number, name in names.items():
            (directory / f"part-{number}").rename(directory / name)
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _headers(file: Path) -> Iterator[Stored]:
    """Yield the tensors in ``file``, without their data."""
    if file.suffix == ".bin":
        for name, tensor in _unpickled(file).items():
            yield Stored(file, name, tuple(tensor.shape), _FLOATS.get(tensor.dtype, str(tensor.dtype)))
        return
    with _opened(file) as opened:
        for name in opened.keys():  # noqa: SIM118  (not a dict)
            header = opened.get_slice(name)
            yield Stored(file, name, tuple(header.get_shape()), header.get_dtype())


def _opened(file: Path) -> safe_open:
    with using(file):
        return safe_open(file, framework="pt")


def _unpickled(file: Path) -> dict[str, Tensor]:
    """Load the tensors of PyTorch's own format, which stay on disk until they are used, unless it is the oldest
    version.

    Raises UserError for a file that is damaged, or asks for code to be run.
    """
    with using(file):
        try:
            tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
        except Exception as error:  # of many kinds: the file's bytes determine which function is called, and with what
            if code := would_run(error):
                raise UserError(
                    f"{file} is refused: loading it would run code ({code}). Give a file that you trust."
                ) from error
            raise ValueError(error) from error
        if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
            raise TypeError("it holds more than tensors by their names")
    return tensors


def file_name(number: int, files: int) -> str:
    """Return the name of weight file ``number``, from 1, of ``files``."""
    return "model.safetensors" if files == 1 else f"model-{number:05}-of-{files:05}.safetensors"


def weights_size(directory: Path) -> int:
    """Return the bytes of the weight files of a model directory."""
    return sum(file.stat().st_size for file in weight_files(directory))
