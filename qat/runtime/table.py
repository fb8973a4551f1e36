"""Tables: objects of one kind, by the name that a setting gives. A new object is one file and one line in a table."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, TypeVar

from qat.runtime.errors import UserError
from qat.runtime.settings import LATER

T = TypeVar("T")


class Table(Mapping[str, T], Generic[T]):
    """The objects of one kind, in the order in which they were added.

    Args:
        kind: their kind, for messages: "loss", "quantizer"
        things: the package's own objects; plug-ins ``add`` theirs
    """

    def __init__(self, kind: str, **things: T):
        self.kind = kind
        self._things = dict(things)

    def add(self, name: str, thing: T) -> T:
        """Add ``thing`` as ``name``; raise ValueError if another object has that name."""
        if self._things.get(name, thing) is not thing:
            raise ValueError(f"There is a {self.kind} {name!r} already.")
        self._things[name] = thing
        return thing

    def those(self, wanted: Callable[[T], bool]) -> "Table[T]":
        """Return a table of the objects for which ``wanted`` is true."""
        return Table(self.kind, **{name: thing for name, thing in self.items() if wanted(thing)})

    def __getitem__(self, name: str) -> T:
        if name not in self._things:
            raise UserError(
                f"The {self.kind} {name!r} is unknown: choose {' or '.join(self)}, or load its plug-in with --plugin."
            )
        return self._things[name]

    def __contains__(self, name: object) -> bool:
        return name in self._things

    def __iter__(self) -> Iterator[str]:
        return iter(self._things)

    def __len__(self) -> int:
        return len(self._things)


def choice(
    default: str, choices: Callable[[], Mapping[str, Any]], separator: str | None = None, later: bool = False
) -> Any:
    """Return a dataclass field with the choices of a table, which may grow after its class was made.

    ``check_choices`` refuses other values, and the commands' ``--help`` lists each choice with its ``meaning``.

    Args:
        separator: separator of several choices in one value; None if only one is allowed
        later: whether earlier versions did not have the field: see LATER
    """
    metadata = {"choices": choices, "separator": separator, **(LATER if later else {})}
    return dataclasses.field(default=default, metadata=metadata)


def choices_of(kind: type) -> dict[str, Mapping[str, Any]]:
    """Return the choices of a dataclass's fields made by ``choice``."""
    return {
        field.name: field.metadata["choices"]() for field in dataclasses.fields(kind) if "choices" in field.metadata
    }


def check_choices(settings: Any) -> None:
    """Raise UserError if the value of a field made by ``choice`` is not one of its choices."""
    separators = {field.name: field.metadata.get("separator") for field in dataclasses.fields(settings)}
    for name, choices in choices_of(type(settings)).items():
        given, separator = getattr(settings, name), separators[name]
        parts = given.split(separator) if separator and isinstance(given, str) else [given]
        if any(part not in choices for part in parts):
            plugin = ", or load its plug-in with --plugin" if isinstance(choices, Table) else ""
            raise UserError(f"{name}={given!r} is invalid: choose {' or '.join(choices)}{plugin}.")
