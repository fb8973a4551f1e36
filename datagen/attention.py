"""Attention of a decoding step: one new token per slot, each at its own position of a static KV cache.

Kernels of our own read each cached key and value once, and none beyond a slot's position: on CPUs, in fp32, one that is
compiled on first use, in about a second; on GPUs one in Triton (datagen.attention_triton). Where there is no compiler,
and for heads of other sizes, torch's scaled_dot_product_attention computes the same, reading all slots up to the
position of the longest one.
"""

import ctypes
import functools
import logging
import os
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from qat.runtime.errors import first_line

_logger = logging.getLogger("qat.attention")

_SOURCE = Path(__file__).with_suffix(".cpp")
_FLAGS = [
    "-O3",
    "-march=native",
    "-mprefer-vector-width=512",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fopenmp",
    "-std=c++17",
    "-shared",
    "-fPIC",
]


TRITON_SIZES = (32, 64, 128, 256)
"""Sizes of heads that the kernel for GPUs is written for: the halves that RoPE rotates are powers of two."""

_LANES = 16
"""Tokens of a block of keys in our kernel's cache."""


class Attention:
    """The KV cache of one layer, [slots, kv_heads, max_length, head_dim] each, and attention over it.

    Args:
        window: a token attends to this many of the last tokens, itself included; None for all

    Attributes:
        kernel: our compiled kernel on CPUs, where it can be used
        triton: the module of our kernel on GPUs, where it can be used
    """

    def __init__(
        self, slots: int, kv_heads: int, groups: int, max_length: int, head_dim: int, window: int | None, like: Tensor
    ):
        self.groups, self.window = groups, window
        possible = like.device.type == "cpu" and like.dtype == torch.float32 and head_dim % _LANES == 0
        self.kernel = kernel(head_dim, groups) if possible else None
        self.triton = kernel_on_gpu(like.device, like.dtype, head_dim, groups)
        if self.kernel:  # it needs complete blocks, with the tokens of a block of keys side by side
            max_length = -(-max_length // _LANES) * _LANES
        self.values = torch.zeros(slots, kv_heads, max_length, head_dim, dtype=like.dtype, device=like.device)
        self.keys = torch.zeros_like(self.values)
        if self.kernel:
            self.keys = self.keys.view(slots, kv_heads, -1, head_dim, _LANES)

    def keep(self, slots: Tensor) -> None:
        """Keep only the given slots [kept] and drop all others."""
        self.keys, self.values = self.keys[slots], self.values[slots]

    def __call__(self, qkv: Tensor, cos: Tensor, sin: Tensor, position: Tensor, columns: int) -> Tensor:
        """Put the tokens into the cache and let them attend to all up to themselves.

        Args:
            qkv: [slots, (query heads + 2 * kv_heads) * head_dim], before the rotation
            cos, sin: [slots, head_dim], of the rotation at each slot's position
            position: [slots], int64
            columns: the largest position + 1

        Returns [slots, query heads * head_dim].
        """
        slots, kv_heads, max_length, head_dim = self.values.shape
        if self.kernel:
            out = torch.empty(slots, kv_heads * self.groups * head_dim)
            tensors = (qkv, cos, sin, position, self.keys, self.values, out)
            assert all(tensor.is_contiguous() for tensor in tensors)
            window = max_length if self.window is None else self.window
            self.kernel(*(tensor.data_ptr() for tensor in tensors), slots, kv_heads, max_length, window)
            return out
        if self.triton:
            return self.triton.attend(qkv, cos, sin, position, self.keys, self.values, self.window)
        return by_torch(qkv, cos, sin, position, self.keys, self.values, columns, self.window)


def by_torch(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    position: Tensor,
    keys: Tensor,
    values: Tensor,
    columns: int,
    window: int | None,
) -> Tensor:
    """Compute ``Attention`` over caches [slots, kv_heads, max_length, head_dim] by torch's attention."""
    slots, kv_heads, _, head_dim = values.shape
    heads = qkv.view(slots, -1, head_dim)
    rotated, value = heads[:, :-kv_heads], heads[:, -kv_heads:]
    left, right = rotated.chunk(2, -1)
    rotated = rotated * cos[:, None] + torch.cat((-right, left), -1) * sin[:, None]
    query, key = rotated[:, :-kv_heads], rotated[:, -kv_heads:]
    at = (torch.arange(slots, device=qkv.device), slice(None), position)
    keys[at], values[at] = key, value
    column = torch.arange(columns, device=qkv.device)
    mask = column <= position[:, None]
    if window is not None:
        mask &= column > position[:, None] - window
    # The query heads of a KV head are stacked as its rows, so nothing is repeated.
    grouped = query.reshape(slots, kv_heads, -1, head_dim)
    out = scaled_dot_product_attention(
        grouped, keys[:, :, :columns], values[:, :, :columns], attn_mask=mask[:, None, None]
    )
    return out.reshape(slots, -1)


@functools.cache
def kernel_on_gpu(device: torch.device, dtype: torch.dtype, head_dim: int, groups: int) -> ModuleType | None:
    """Return datagen.attention_triton if ``device`` is a GPU on which its kernel works for such heads, with ``groups``
    query heads per KV head; None elsewhere, and with ``QAT_KERNELS=0`` in the environment."""
    if device.type != "cuda" or os.environ.get("QAT_KERNELS") == "0":
        return None
    if head_dim not in TRITON_SIZES or dtype not in (torch.bfloat16, torch.float16):
        return None
    try:
        from datagen import attention_triton

        _check(attention_triton, device, dtype, head_dim, groups)
    except Exception as error:  # whatever is missing or broken, torch's attention does the work
        _logger.warning(
            "no kernel of our own for attention (%s): torch's is used, which reads more of the cache", first_line(error)
        )
        return None
    return attention_triton


def _check(own: ModuleType, device: torch.device, dtype: torch.dtype, head_dim: int, groups: int) -> None:
    """Raise RuntimeError if ``own``, with a short cache, computes or writes something else than torch."""
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 3, 2, 300, head_dim, generator=generator, device="cpu").to(device, dtype)
    qkv = torch.randn(3, (2 * groups + 4) * head_dim, generator=generator, device="cpu").to(device, dtype)
    angles = torch.randn(3, head_dim // 2, generator=generator, device="cpu").repeat(1, 2)
    cos, sin = (turn.to(device, dtype) for turn in (angles.cos(), angles.sin()))
    position = torch.tensor([0, 70, 299], device=device)
    for window in (None, 100):
        own_keys, own_values = keys.clone(), values.clone()
        found = own.attend(qkv, cos, sin, position, own_keys, own_values, window)
        expected = by_torch(qkv, cos, sin, position, keys, values, 300, window)
        off = ((found.float() - expected.float()).norm() / expected.float().norm()).item()
        if not off < 0.01:
            raise RuntimeError(f"its result differs from torch's by {off:.2g} of it")
        if not torch.equal(own_keys, keys) or not torch.equal(own_values, values):
            raise RuntimeError("it writes other keys or values than torch does")


@functools.cache
def kernel(head_dim: int, groups: int) -> Callable[..., None] | None:
    """Return the compiled kernel for heads of size ``head_dim``, with ``groups`` query heads per KV head; None if it
    cannot be compiled here."""
    with tempfile.TemporaryDirectory() as directory:
        library = Path(directory) / "attention.so"
        sizes = [f"-DHEAD_DIM={head_dim}", f"-DGROUPS={groups}"]
        command = [os.environ.get("CXX", "g++"), *_FLAGS, *sizes, str(_SOURCE), "-o", str(library)]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
            function = ctypes.CDLL(str(library)).attend
        except (OSError, subprocess.CalledProcessError) as error:
            _logger.warning("no kernel of our own for attention (%s): torch's is used, which is slower", error)
            return None
    function.argtypes = [ctypes.c_void_p] * 7 + [ctypes.c_int64] * 4
    function.restype = None
    return function
