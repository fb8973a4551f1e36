"""Fusing small tensor functions into one pass over memory, where a compiler is there to do it.

``torch.compile`` needs a C++ compiler on CPUs and Triton on GPUs. Where either is missing, or
``TORCHDYNAMO_DISABLE=1`` says so, the same functions run eagerly: slower, with the same bits.
"""

import functools
import logging
import os
from collections.abc import Callable
from typing import TypeVar

import torch

F = TypeVar("F", bound=Callable)

_logger = logging.getLogger(__name__)

_OPTIONS: dict[str, str | int | bool | Callable] = {"eager_numerics.division_rounding": True}
"""Triton's own division is approximate; eager mode's, and ours, is rounded correctly."""


def fused(function: F) -> F:
    """``function`` of tensors [rows, ...], compiled at its first call; as it is, where nothing compiles."""
    compiled: Callable | None = None

    @functools.wraps(function)
    def call(*args):
        nonlocal compiled
        if len(args[0]) < 2:  # one row would be compiled as a case of its own
            return function(*args)
        if not compiles(args[0].device.type):
            return function(*args)
        if compiled is None:
            compiled = torch.compile(function, dynamic=True, options=_OPTIONS)
        return compiled(*args)

    return call  # type: ignore[return-value]


@functools.cache
def compiles(device: str) -> bool:
    """Whether ``torch.compile`` works here for tensors of a device type: tried once, with a tiny function."""
    if os.environ.get("TORCHDYNAMO_DISABLE") == "1":
        return False
    try:
        torch.compile(lambda x: (x + 1).sin(), dynamic=True)(torch.ones(8, device=device))
    except Exception as error:  # whatever is missing or broken, training goes on without it
        reason = str(error).strip().splitlines()
        _logger.warning(
            "torch.compile does not work here on %s (%s): quantizers run eagerly.", device, reason[0] if reason else "?"
        )
        return False
    return True
