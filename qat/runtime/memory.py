"""The memory of a rank's device: its size, a warning if a plan needs more, and the peak that was held."""

import logging
import os
import resource
from collections.abc import Mapping

import psutil
import torch
from torch.torch_version import TorchVersion

from qat.runtime.machine import device, local_ranks

PROCESS = {"cpu": 1.1e9, "cuda": 1.5e9}
"""Bytes that a rank holds without a model: on a CPU Python, the libraries and torch.compile, measured; on a GPU its
context, assumed."""

_logger = logging.getLogger(__name__)


def of_rank() -> float:
    """Return the bytes that this rank may hold: all of its GPU's; without a GPU, its share of the host's available
    memory."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(device()).total_memory
    return of_host() / local_ranks()


def of_host() -> float:
    """Return the bytes that are available on this host."""
    return psutil.virtual_memory().available


def peak() -> int:
    """Return the most bytes that this process has held: on its GPU, or, without one, resident on the host."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def planned_peak(needs: Mapping[str, float]) -> float:
    """Return the ``peak`` expected from a plan's ``needs``: torch does not count a GPU's CUDA context."""
    return sum(needs.values()) - (needs["process"] if torch.cuda.is_available() else 0.0)


def beside_plan(needs: Mapping[str, float]) -> str:
    """Return a line with the memory that was held at most, and what was planned."""
    return f"peak memory of a rank: {peak() / 1e9:.2f} GB, {planned_peak(needs) / 1e9:.2f} GB planned"


def check_rank(work: str, needs: Mapping[str, float], advice: str) -> None:
    """Warn if a plan needs more of each rank's device than there is. This is not an error: plans are estimates.

    Args:
        work: the planned work
        needs: bytes, by purpose
        advice: what to change
    """
    _check(work, "GPU" if torch.cuda.is_available() else "rank", needs, of_rank(), advice)


def check_host(work: str, offloaded: float, advice: str) -> None:
    """Warn likewise if a plan offloads more bytes to a node's host than are available."""
    _check(work, "host", {"offloaded state": offloaded}, of_host(), advice)


def _check(work: str, place: str, needs: Mapping[str, float], there: float, advice: str) -> None:
    needed = sum(needs.values())
    if needed <= there:
        return
    largest_first = sorted(needs.items(), key=lambda part: part[1], reverse=True)
    parts = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in largest_first)
    _logger.warning(
        "warning: %s may run out of memory: as planned it needs %.1f GB on each %s (%s), which has %.1f GB: %s",
        work, needed / 1e9, place, parts, there / 1e9, advice,
    )  # fmt: skip


def let_segments_grow() -> None:
    """Let the caching allocator enlarge its segments of GPU memory instead of reserving new ones, as sequences of many
    lengths fragment it; and let it not round large blocks of the host's pinned memory up to powers of two, which would
    take up to twice as much where weights or optimizer are offloaded.

    Call it before CUDA is first used, when torch reads the variable. A user's own setting is left alone.
    """
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the older name, which torch reads first
        settings = ["expandable_segments:True"]
        if TorchVersion(torch.__version__) >= "2.13":  # older ones refuse what they do not know
            settings.append("pinned_max_round_threshold_mb:1")
        os.environ.setdefault("PYTORCH_ALLOC_CONF", ",".join(settings))


def free_unused_pinned() -> None:
    """Return pinned memory that torch keeps for later use to the host: DeepSpeed pins weights one by one, and then
    all of them once more in one piece."""
    if torch.cuda.is_available() and hasattr(torch.accelerator, "empty_host_cache"):  # torch 2.11 has none
        torch.accelerator.empty_host_cache()
