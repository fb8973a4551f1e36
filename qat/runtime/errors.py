"""The one exception that users are meant to see, and helpers for its messages."""

from collections.abc import Iterable
from typing import Any


class UserError(ValueError):
    """An invalid input. The message states what was given, what is allowed and what to change.

    The entry points in ``launch/`` print the message alone, without a traceback.
    """


def first_line(error: Exception) -> str:
    """Return the first line of an exception's message; its type if the message is empty."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def in_one_line(error: Exception) -> str:
    """Return an exception's message, which may have several lines, as one line; with the exception's type if the
    message is a single word or empty."""
    message = " ".join(str(error).split())
    return message if " " in message else f"{type(error).__name__} {message}".strip()


def check_one_of(settings: object, **choices: Iterable[str]) -> None:
    """Raise UserError if a field of ``settings`` has a value that is not among its ``choices``."""
    for name, allowed in choices.items():
        given = getattr(settings, name)
        if given not in allowed:
            raise UserError(f"{name}={given!r} is invalid: choose {' or '.join(allowed)}.")


def check_least(settings: object, **least: float) -> None:
    """Raise UserError if a field of ``settings`` is below its minimum in ``least``."""
    for name, allowed in least.items():
        given = getattr(settings, name)
        if given < allowed:
            raise UserError(f"{name}={given} is invalid: choose {allowed} or more.")


def differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Return "lr was 0.1, now 0.2, quant.w_bits was ..." for the settings that differ; empty if none does."""
    before, now = _dotted(before), _dotted(now)
    differing = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    return ", ".join(f"{key} was {before.get(key)!r}, now {now.get(key)!r}" for key in differing)


def _dotted(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of all sections, by their dotted names."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            flat |= {f"{key}.{name}": inner for name, inner in _dotted(value).items()}
        else:
            flat[key] = value
    return flat
