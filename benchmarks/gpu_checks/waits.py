"""Who makes the host wait for the device, which then runs dry."""

import sys
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_ROOT = Path(__file__).parents[2]
_WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2")
"""Operators that give Python, or the shape of a tensor, a number that only the device knows."""


def waits(call: Callable[[], object]) -> dict[str, int]:
    """Count what waits for the device in ``call``, by the innermost function of this repository, DeepSpeed or
    transformers that asks for it.

    On a GPU these are torch's own warnings (``set_sync_debug_mode``), which leave explicit synchronizations out: the
    profiler counts those. On a CPU, which has nobody to wait for, they are the operators that would wait on a GPU.
    """
    found: Counter[str] = Counter()
    if not torch.cuda.is_available():
        with _Operators(found):
            call()
        return dict(found)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *_, **__: found.update([_caller()] * ("synchronizing" in str(message)))
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return dict(found)


def ours(found: dict[str, int]) -> dict[str, int]:
    """Return the waits that DeepSpeed is not to blame for."""
    return {caller: count for caller, count in found.items() if not caller.startswith("deepspeed/")}


class _Operators(TorchDispatchMode):
    def __init__(self, found: Counter[str]):
        super().__init__()
        self._found = found

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operator.overloadpacket.__name__ in _WAITING:
            self._found[_caller()] += 1
        return operator(*args, **(kwargs or {}))


def _caller() -> str:
    frame = sys._getframe(1)
    while frame.f_back:
        file = Path(frame.f_code.co_filename)
        packages = [file.relative_to(_ROOT)] if file.is_relative_to(_ROOT) and "site-packages" not in file.parts else []
        for name in ("deepspeed", "transformers"):
            if name in file.parts and "site-packages" in file.parts:
                packages.append(Path(*file.parts[file.parts.index(name) :]))
        if packages and file != Path(__file__):
            return f"{packages[0]}: {frame.f_code.co_name}"
        frame = frame.f_back
    return "autograd"
