"""Settings that a later version added: a record without one has the meaning that it had when it was written."""

import dataclasses
from typing import Any

LATER = {"later": True}
"""Metadata of a dataclass's field that earlier versions did not have. It is recorded only if it is not its default, so
that equal settings have equal records, whatever the version; where it is missing, it is its default."""


def is_later(field: dataclasses.Field) -> bool:
    """Return whether earlier versions did not have this field."""
    return "later" in field.metadata


def recorded(settings: Any) -> dict[str, Any]:
    """Return the fields of a dataclass that are to be recorded: the later ones only if they are not their default."""
    values = dataclasses.asdict(settings)
    return {
        field.name: values[field.name]
        for field in dataclasses.fields(settings)
        if not is_later(field) or values[field.name] != _default(field)
    }


def _default(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
