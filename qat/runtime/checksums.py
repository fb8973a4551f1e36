"""Checksums of files: ``NAME.crc32`` beside the file NAME holds its name, size and CRC-32.

The checksum is written first, and then NAME appears: it never exists without one. Each file has its own, so that
processes that write several files of a folder need not know each other. Files of earlier versions have none.
"""

import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qat.runtime.files import appearing

_BLOCK = 1 << 24


@contextmanager
def appearing_with_checksum(path: Path) -> Iterator[Path]:
    """Write a file as ``files.appearing`` does, and its checksum."""
    with appearing(path) as partial:
        yield partial
        entry = {"file": path.name, **entry_of(partial)}
        with appearing(_beside(path)) as beside:
            beside.write_text(json.dumps(entry) + "\n")


def damage(path: Path) -> str:
    """Describe the damage of the file ``path`` by its checksum; return "" if there is none, or no checksum."""
    try:
        entry = json.loads(_beside(path).read_text())
        name, size, expected = entry["file"], entry["bytes"], entry["crc32"]
    except FileNotFoundError:
        return ""
    except (ValueError, KeyError, TypeError):
        return f"{_beside(path).name} is damaged"
    if name != path.name:
        return f"{_beside(path).name} is that of {name}"
    return f"it {fault}" if (fault := mismatch(path, size, expected)) else ""


def entry_of(path: Path) -> dict[str, Any]:
    """Return what is recorded of a file: its size and checksum."""
    return {"bytes": path.stat().st_size, "crc32": checksum(path)}


def mismatch(path: Path, size: int, crc: str) -> str:
    """Describe how a file differs from its record, as the end of a sentence; return "" if it does not."""
    if path.stat().st_size != size:
        return f"has {path.stat().st_size} bytes, not {size}"
    if checksum(path) != crc:
        return "has another checksum than when it was written"
    return ""


def checksum(path: Path) -> str:
    """Compute the CRC-32 of a file: it detects accidents, at several times the speed of SHA-256."""
    crc = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            crc = zlib.crc32(block, crc)
    return f"{crc:08x}"


def _beside(path: Path) -> Path:
    return path.with_name(path.name + ".crc32")
