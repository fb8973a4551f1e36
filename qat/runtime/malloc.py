"""Settings of the C library's allocator that make a CPU rank fast."""

import ctypes
import os
import sys

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8  # glibc's malloc.h


def keep_freed_memory() -> None:
    """Tell glibc to reuse large blocks instead of returning them to the kernel after each tensor.

    A training step allocates and frees gigabytes of temporaries; by default every one of them is mapped
    and zeroed page by page again. Call it before the first large tensor. Other C libraries are left alone.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch: huge pages for large CPU tensors
    if (libc := _glibc()) is None:
        return
    libc.mallopt(_M_ARENA_MAX, 1)
    libc.mallopt(_M_MMAP_MAX, 0)
    libc.mallopt(_M_TRIM_THRESHOLD, -1)
    libc.mallopt(_M_TOP_PAD, 64 * 2**20)


def return_freed_memory() -> None:
    """Tell glibc to return what is free to the kernel, also between blocks that are in use.

    Tensors of many lengths leave gaps that no later one fits: without this, a CPU rank grows by megabytes in a step,
    for as long as it trains.
    """
    if (libc := _glibc()) is not None:
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    """Return this process's glibc; None where the C library is another one."""
    libc = ctypes.CDLL(None) if sys.platform.startswith("linux") else None
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None
