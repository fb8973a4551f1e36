"""The one exception that users are meant to see, and a phrase that many of its messages need."""

from typing import Any


class UserError(ValueError):
    """A wrong input. The message says what was given, what is allowed and what to change.

    The entry points in ``launch/`` print the message alone, without a traceback.
    """


def differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    """ "lr was 0.1, now 0.2, seed was ..." for the settings that differ; empty if none does."""
    differing = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    return ", ".join(f"{key} was {before.get(key)!r}, now {now.get(key)!r}" for key in differing)
