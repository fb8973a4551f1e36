"""The manifest of a checkpoint's folder: the size and the checksum of each file; it is written last."""

import json
from pathlib import Path
from typing import Any

from qat.runtime.checksums import entry_of, mismatch
from qat.runtime.files import MANIFEST


def entries(folder: Path, rank: int, ranks: int) -> dict[str, dict[str, Any]]:
    """Return size and checksum of the files of ``folder``, by name; of ``ranks`` that share them, those of ``rank``."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): entry_of(path) for path in files[rank::ranks]}


def damage(folder: Path, rank: int = 0, ranks: int = 1) -> str:
    """Describe the damage of a checkpoint, or of ``rank``'s share of it; return "" if there is none."""
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
        expected = {name: (entry["bytes"], entry["crc32"]) for name, entry in files.items()}
    except OSError:
        return "it is half-written"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"its {MANIFEST} is damaged"
    for name in sorted(expected)[rank::ranks]:
        path, (size, crc) = folder / name, expected[name]
        if not path.is_file():
            return f"{name} is missing"
        if fault := mismatch(path, size, crc):
            return f"{name} {fault}"
    return ""
