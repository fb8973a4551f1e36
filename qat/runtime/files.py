"""Files that appear complete or not at all, and folders that one process works in."""

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from qat.runtime.errors import UserError, in_one_line

_MISUSE = (ArithmeticError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError)
"""Exceptions that Python raises when a value is not what it should be."""

LOCK = "lock"
"""Name of the file by which a folder is locked."""

MANIFEST = "manifest.json"
"""Name of the file in a folder of shards, targets or a checkpoint that says what made it, or what belongs to it."""

_UNFINISHED = "unfinished"
"""Name of the file that marks a folder that is being written."""

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""Error numbers of a file system without locks."""


@contextmanager
def writing(place: Path) -> Iterator[None]:
    """Raise UserError if files cannot be written at ``place`` in this context."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{place} cannot be written to ({getattr(error, 'strerror', None) or error}): existing files are intact; "
            "make room, or choose a writable place, and run the same command again."
        ) from error


@contextmanager
def utf8(path: Path) -> Iterator[IO[str]]:
    """Open the text file at ``path``; raise UserError, which names the line, if it is not UTF-8."""
    try:
        with path.open(encoding="utf-8") as stream:
            yield stream
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}, line {_undecodable(path)}, is not UTF-8 text ({error.reason}): convert it."
        ) from error


def _undecodable(path: Path) -> int:
    """Return the number of the first line that is not UTF-8."""
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return number
    raise AssertionError(f"{path} is UTF-8")


@contextmanager
def appearing(path: Path, suffix: str = ".partial") -> Iterator[Path]:
    """Yield a new, empty file beside ``path`` to write; at the end, flush it to the disk and rename it to ``path``: a
    reader never sees half a file, and a kill never leaves one.

    What a kill left under the partial name is deleted, and a symbolic link there is not followed. Only one process at a
    time may write ``path``, or each needs a ``suffix`` of its own. If writing fails, nothing is left.
    """
    partial = path.with_name(path.name + suffix)
    partial.unlink(missing_ok=True)
    os.close(os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file that appears complete, even if other processes write it too."""
    with appearing(path, f".partial-{os.getpid()}") as partial:
        partial.write_bytes(content if isinstance(content, bytes) else content.encode())


def partial_of(folder: Path) -> Path:
    """Return the folder that becomes ``folder`` when it is complete."""
    return folder.with_name(folder.name + ".partial")


def check_new(folder: Path) -> None:
    """Raise UserError if ``folder`` exists, or what ``check_partial`` refuses is in its place."""
    if folder.exists():
        raise UserError(f"{folder} already exists: give another folder.")
    check_partial(folder)


def check_partial(folder: Path, mark: str = _UNFINISHED) -> None:
    """Raise UserError if something other than an unfinished ``folder``, with the file ``mark``, is in its place."""
    partial = partial_of(folder)
    is_folder = partial.is_dir() and not partial.is_symlink()
    held = {path.name for path in partial.iterdir()} - {LOCK} if is_folder else set()
    if (held and mark not in held) or (os.path.lexists(partial) and not is_folder):
        raise UserError(
            f"{partial}, the temporary folder for {folder}, was not left by this command: finish the command that "
            "left it, or move it away."
        )


@contextmanager
def appearing_folder(folder: Path, record: str = "") -> Iterator[Path]:
    """Yield a folder beside ``folder`` to write, locked against other processes; at the end, rename it to ``folder``.

    Raises UserError if another process is working in it, or something else is in its place.

    Args:
        record: the file that the caller writes first into a folder that a later start can resume. Without one,
            what an earlier start left is deleted, and what this one leaves
    """
    partial = partial_of(folder)
    check_partial(folder, record or _UNFINISHED)
    with locked(partial):
        if not record:
            with writing(partial):
                _empty(partial)
                (partial / _UNFINISHED).touch()
        try:
            yield partial
        except BaseException:
            if not record:
                shutil.rmtree(partial)
            raise
        with writing(folder):
            for passing in (LOCK, _UNFINISHED):
                (partial / passing).unlink(missing_ok=True)
            partial.rename(folder)


def _empty(partial: Path) -> None:
    for path in partial.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name not in (LOCK, _UNFINISHED):
            path.unlink()


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file that appears complete, with the permissions of the umask; safetensors makes it private
    to its owner.

    Raises UserError where it cannot be written.
    """
    with writing(path.parent), appearing(path) as partial:
        mode = partial.stat().st_mode
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata={"format": "pt"})
        partial.chmod(mode)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file; raise UserError if it is damaged."""
    with using(path):
        return load_file(path)


@contextmanager
def using(path: Path) -> Iterator[None]:
    """Raise UserError, which names the file at ``path``, if its content turns out to be invalid when it is used in this
    context."""
    try:
        yield
    except (*_MISUSE, SafetensorError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else in_one_line(error)
        raise UserError(f"{path} is damaged ({reason}): copy it again, or recreate it.") from error


def read_json(path: Path) -> dict[str, Any]:
    """Read the JSON object in a file; raise UserError if it is damaged."""
    with using(path):
        content = json.loads(path.read_text())
        if not isinstance(content, dict):
            raise TypeError("it holds no JSON object")
    return content


def read_lines(path: Path) -> list[Any]:
    """Read a file with one JSON value per line; an unfinished last line, left by a kill, is dropped.

    Raises UserError if the file is damaged.
    """
    with using(path):
        return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def lock(directory: Path) -> None:
    """Keep other processes out of ``directory`` until this one ends, for whatever reason.

    Raises UserError if another one is in it.
    """
    _lock(directory, open_lock(directory))


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Lock ``directory`` in this context; raise UserError if another process is in it."""
    handle = open_lock(directory)
    try:
        _lock(directory, handle)
        yield
    finally:
        os.close(handle)


def wait_until_free(directory: Path) -> None:
    """Wait until no other process has locked ``directory``; print a message if that takes time."""
    handle = open_lock(directory)
    with locking(directory):
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"An earlier run is still using {directory}: waiting until it ends ...", flush=True)
            fcntl.flock(handle, fcntl.LOCK_EX)
    os.close(handle)


def open_lock(directory: Path) -> int:
    """Return a descriptor of the folder's lock file, and make both if they do not exist; it closes with the process,
    and its locks are released."""
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
        return os.open(directory / LOCK, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o666)


@contextmanager
def locking(directory: Path) -> Iterator[None]:
    """Raise UserError if the file system cannot lock a file of ``directory`` in this context."""
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        raise UserError(
            f"{directory} is on a file system without file locks ({error.strerror}), which keep two runs out of one "
            "folder: give a folder on a local disk, NFS 4, GPFS, or Lustre mounted with -o flock."
        ) from error


def _lock(directory: Path, handle: int) -> None:
    with locking(directory):
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"Another run is still using {directory}: wait until it ends, or stop it.") from error
