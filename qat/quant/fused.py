"""Fusing small tensor functions into one pass over memory, where a compiler is available.

On GPUs some of them have a Triton kernel of ours (qat.quant.kernels). ``torch.compile`` makes the others, and all of
them on CPUs; it needs a C++ compiler there, and Triton on GPUs. Where either is missing, or with
``TORCHDYNAMO_DISABLE=1``, the same functions run eagerly: slower, with the same bits.
"""

import functools
import logging
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from qat.quant import kernels
from qat.runtime.errors import first_line

F = TypeVar("F", bound=Callable)

_logger = logging.getLogger(__name__)

_DIVISION = ("eager_numerics.division_rounding", "emulate_divison_rounding")
"""Triton's own division is approximate; eager mode's, and ours, is rounded correctly. The option's name from torch 2.11
on, and in 2.10."""

_CASTS = "emulate_precision_casts"
"""Without it the compiler drops the rounding of x.half().float(), and on GPUs fuses products with sums."""

_VARIANTS = 64
"""Dtypes, strides and modes make variants of a function, more than the eight after which torch would give up
permanently."""


def fused(function: F, kernel: str = "") -> F:
    """Return ``function`` of tensors [rows, ...], compiled at its first call; unchanged, if it cannot be compiled. The
    ``kernel`` of this name takes its place where there are kernels, and it has one for the arguments."""
    compiled: Callable | None = None

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        nonlocal compiled
        device = args[0].device
        if kernel and (own := kernels.on(device.type)) and (result := getattr(own, kernel)(*args)) is not None:
            return result
        if len(args[0]) < 2:  # one row would be compiled as a special case
            return function(*args)
        if not compiles(device.type) or (_has_float8(args) and not _compiles_float8(device)):
            return function(*args)
        if torch._dynamo.config.recompile_limit != _VARIANTS:  # each thread has a limit, and on GPUs backward its own
            torch._dynamo.config.recompile_limit = _VARIANTS
        if compiled is None:
            compiled = torch.compile(function, dynamic=True, options=options())
        with torch.no_grad():  # none of these is differentiated, and the grad mode would make two variants of each
            try:
                return compiled(*args)
            except torch._dynamo.exc.TorchDynamoException as error:  # some torch cannot compile this one: eagerly then
                _logger.warning(
                    "torch.compile fails for %s (%s): it runs eagerly.", function.__name__, first_line(error)
                )
                compiled = function
                return function(*args)

    return call  # type: ignore[return-value]


def with_kernel(name: str) -> Callable[[F], F]:
    """Return ``fused`` for a function that has a kernel of this name."""
    return functools.partial(fused, kernel=name)


def _has_float8(args: tuple[Any, ...]) -> bool:
    """Return whether a tensor is of 8-bit floats, or a quantizer makes such codes."""
    return any(torch.float8_e4m3fn in (getattr(a, "dtype", None), getattr(a, "code_dtype", None)) for a in args)


def _compiles_float8(device: torch.device) -> bool:
    """Return whether compiled code converts 8-bit floats: Triton's does not on GPUs before Ada, where torch's own code
    does."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)


@functools.cache
def compiles(device: str) -> bool:
    """Return whether ``torch.compile`` works here for tensors of a device type, with the options that ``fused`` passes:
    tried once, with a tiny function, which must give the bits of eager mode."""
    if os.environ.get("TORCHDYNAMO_DISABLE") == "1":
        return False
    try:
        if device != "cpu" and not options().keys() & set(_DIVISION):
            raise RuntimeError(f"this torch, {torch.__version__}, has no option for exact division")
        x = torch.arange(1.0, 65.0, device=device)
        compiled = torch.compile(_trial, dynamic=True, options=options())
        if not torch.equal(compiled(x), _trial(x)):  # torch 2.11 ignores the second option on CPUs
            raise RuntimeError(f"this torch, {torch.__version__}, does not round where eager mode does")
    except Exception as error:  # whatever is missing or broken, training continues eagerly
        _logger.warning(
            "torch.compile does not work here on %s (%s): quantizers run eagerly.", device, first_line(error)
        )
        return False
    return True


def _trial(x: torch.Tensor) -> torch.Tensor:
    return (x / (x + 1)).half().float() * 3


@functools.cache
def options() -> dict[str, str | int | bool | Callable]:
    """Return the options for ``torch.compile`` that make it round where eager mode does."""
    known = torch._inductor.list_options()
    return {name: True for name in (*_DIVISION, _CASTS) if name in known}
