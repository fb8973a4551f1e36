"""Files that are whole or not there, and folders that one process works in."""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from qat.runtime.errors import UserError, in_one_line

_MISUSE = (ArithmeticError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError)
"""What Python raises where a value is not what it should be."""


@contextmanager
def writing(place: Path) -> Iterator[None]:
    """Within it, files are written at ``place``; raises UserError where they cannot be."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{place} cannot be written to ({getattr(error, 'strerror', None) or error}): what is there is whole; make "
            "room, or give a place that is writable, and run the same command again."
        ) from error


@contextmanager
def utf8(path: Path) -> Iterator[IO[str]]:
    """The text file at ``path``; raises UserError, which names the line, where it is not UTF-8."""
    try:
        with path.open(encoding="utf-8") as stream:
            yield stream
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}, line {_undecodable(path)}, is not UTF-8 text ({error.reason}): convert it."
        ) from error


def _undecodable(path: Path) -> int:
    """The number of the first line that is not UTF-8."""
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return number
    raise AssertionError(f"{path} is UTF-8")


def write_atomically(path: Path, text: str) -> None:
    """Write ``text`` beside ``path``, then rename: a reader, or a kill, never meets half a file."""
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    try:
        partial.write_text(text)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    partial.replace(path)


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file that is open to whom the umask allows; safetensors keeps it for its owner.

    Raises UserError, and leaves nothing of it, where it cannot be written.
    """
    with writing(path.parent):
        path.touch()
        mode = path.stat().st_mode
        try:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
        except (OSError, SafetensorError):
            path.unlink()
            raise
        path.chmod(mode)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; raises UserError if it is damaged."""
    with using(path):
        return load_file(path)


@contextmanager
def using(path: Path) -> Iterator[None]:
    """Within it, what the file at ``path`` says is used; raises UserError, which names it, if it says something else
    than what it is for."""
    try:
        yield
    except (*_MISUSE, SafetensorError) as error:
        said = f"it lacks {error}" if isinstance(error, KeyError) else in_one_line(error)
        raise UserError(f"{path} is damaged ({said}): copy it again, or write it anew.") from error


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; raises UserError if it is damaged."""
    with using(path):
        content = json.loads(path.read_text())
        if not isinstance(content, dict):
            raise TypeError("it holds no JSON object")
    return content


def read_lines(path: Path) -> list[Any]:
    """The values of a file with one JSON value a line; a last line that a kill left unfinished is left out.

    Raises UserError if the file is damaged.
    """
    with using(path):
        return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def lock(directory: Path) -> None:
    """Keep other processes out of ``directory`` until this one ends, however it ends.

    Raises UserError if another one is in it.
    """
    try:
        fcntl.flock(_lock_file(directory), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(f"Another run is at work in {directory}: wait until it has ended, or stop it.") from error


def wait_until_free(directory: Path) -> None:
    """Return when no other process has locked ``directory``; say so if that takes waiting."""
    handle = _lock_file(directory)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"An earlier run is still at work in {directory}: waiting until it has ended ...", flush=True)
        fcntl.flock(handle, fcntl.LOCK_EX)
    os.close(handle)


def _lock_file(directory: Path) -> int:
    """A descriptor that closes with the process, which frees what it locks."""
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
        return os.open(directory / "lock", os.O_CREAT | os.O_RDWR)
