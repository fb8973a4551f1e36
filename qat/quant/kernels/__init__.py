"""Triton kernels of ours, for what the compiler makes slow on GPUs.

``torch.compile`` with dynamic shapes divides a kernel's work by the first shape that it sees: after rows of 4096, rows
of 128 (keys and values) and groups of 64 keep few lanes busy. It also costs the host more per call.
"""

import functools
import logging
import os
from types import ModuleType

import torch

from qat.runtime.errors import first_line

_logger = logging.getLogger(__name__)


@functools.cache
def on(device: str) -> ModuleType | None:
    """Return qat.quant.kernels.host, the kernels for tensors on a device of this type, where Triton is there and they
    run as they should: tried once. None on CPUs, and with ``QAT_KERNELS=0`` in the environment."""
    if device != "cuda" or os.environ.get("QAT_KERNELS") == "0":
        return None
    try:
        from qat.quant.kernels import host

        # Whoever is the first may be in another mode, or in a layer with gradient checkpointing, whose hooks would take
        # what the check saves for its own backward passes for the layer's.
        unhooked = torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)
        with torch.inference_mode(False), torch.enable_grad(), unhooked:
            host.check(torch.device(device))
    except Exception as error:  # whatever is missing or broken, compiled functions do the work
        _logger.warning(
            "our kernels cannot be used here (%s): torch.compile makes others. QAT_KERNELS=0 does not try.",
            first_line(error),
        )
        return None
    return host
