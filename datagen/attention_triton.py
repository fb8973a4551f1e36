"""Attention of a decoding step on GPUs, in Triton: RoPE, the cache's new column, and a slot's own past, read once.

torch's attention reads, for all slots, as many columns as the longest one has. Here columns are cut into chunks, one
program each; what lies beyond a slot's position is not read, and chunks are put together at the end. So a step has the
same kernels at every length, and one CUDA graph.

RoPE is rounded as the model's code rounds it, for which products and sums must not be fused; scores, their softmax and
sums are in fp32.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from qat.runtime.machine import current

CHUNK = 256
"""Columns that a program reads at most: a long slot has several, so that few slots fill a GPU too."""

_BLOCK = 64
"""Columns that are in registers at a time."""

_LEAST_ROWS = 16
"""Rows of the smallest product of tensor cores: the query heads of a KV head are padded to them."""

_UNFUSED = {"enable_fp_fusion": False}


@triton.jit
def _turned(x, other, cos, sin, sign: tl.constexpr):
    """x * cos + sign * other * sin, with both products rounded to their dtype, as eager code does."""
    kind = x.dtype
    product = (x.to(tl.float32) * cos.to(tl.float32)).to(kind).to(tl.float32)
    return (product + sign * (other.to(tl.float32) * sin.to(tl.float32)).to(kind).to(tl.float32)).to(kind)


@triton.jit
def _attend(
    qkv, cos, sin, position, keys, values, sums, largest, totals, scale, max_length,
    KV_HEADS: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr, WINDOW: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """For one KV head of one slot and one chunk: weighted sums of values [GROUPS, head_dim], and the weights' largest
    exponent and total [GROUPS]. The chunk that holds the slot's position adds the new token to the cache."""
    slot, head, chunk = tl.program_id(0) // KV_HEADS, tl.program_id(0) % KV_HEADS, tl.program_id(1)
    at = tl.load(position + slot).to(tl.int32)
    if chunk * CHUNK > at:
        return
    size: tl.constexpr = 2 * HALF
    half, row = tl.arange(0, HALF), tl.arange(0, ROWS)
    heads: tl.constexpr = KV_HEADS * GROUPS
    own = qkv + slot.to(tl.int64) * (heads + 2 * KV_HEADS) * size
    cos_left, cos_right = tl.load(cos + slot * size + half), tl.load(cos + slot * size + HALF + half)
    sin_left, sin_right = tl.load(sin + slot * size + half), tl.load(sin + slot * size + HALF + half)
    place = own + (head * GROUPS + row[:, None]) * size + half[None, :]
    left = tl.load(place, mask=row[:, None] < GROUPS, other=0.0)
    right = tl.load(place + HALF, mask=row[:, None] < GROUPS, other=0.0)
    query_left = _turned(left, right, cos_left[None, :], sin_left[None, :], -1)
    query_right = _turned(right, left, cos_right[None, :], sin_right[None, :], 1)

    cached = (slot.to(tl.int64) * KV_HEADS + head) * max_length * size
    column, channel = tl.arange(0, BLOCK), tl.arange(0, 2 * HALF)
    most = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, 2 * HALF], tl.float32)
    first = chunk * CHUNK
    if WINDOW > 0:
        first = tl.maximum(first, (at + 1 - WINDOW) // BLOCK * BLOCK)
    for start in range(first, tl.minimum(chunk * CHUNK + CHUNK, at), BLOCK):
        here = start + column
        seen = here < at
        if WINDOW > 0:
            seen = seen & (here > at - WINDOW)
        key = keys + cached + here[None, :] * size + half[:, None]
        score = tl.dot(query_left, tl.load(key, mask=seen[None, :], other=0.0))
        score = tl.dot(query_right, tl.load(key + HALF, mask=seen[None, :], other=0.0), score)
        score = tl.where(seen[None, :], score * scale, float("-inf"))
        higher = tl.maximum(most, tl.max(score, 1))
        known = tl.where(higher == float("-inf"), 0.0, higher)
        weight = tl.exp2(score - known[:, None])
        fade = tl.exp2(most - known)
        value = tl.load(values + cached + here[:, None] * size + channel[None, :], mask=seen[:, None], other=0.0)
        acc = tl.dot(weight.to(value.dtype), value, acc * fade[:, None])
        total = total * fade + tl.sum(weight, 1)
        most = higher
    if at < chunk * CHUNK + CHUNK:  # the new token is of this chunk
        new = own + (heads + head) * size + half
        new_left, new_right = tl.load(new), tl.load(new + HALF)
        key_left = _turned(new_left, new_right, cos_left, sin_left, -1)
        key_right = _turned(new_right, new_left, cos_right, sin_right, 1)
        new_value = tl.load(own + (heads + KV_HEADS + head) * size + channel)
        tl.store(keys + cached + at * size + half, key_left)
        tl.store(keys + cached + at * size + HALF + half, key_right)
        tl.store(values + cached + at * size + channel, new_value)
        by_left = tl.sum(query_left.to(tl.float32) * key_left[None, :].to(tl.float32), 1)
        by_right = tl.sum(query_right.to(tl.float32) * key_right[None, :].to(tl.float32), 1)
        own_score = (by_left + by_right) * scale
        top = tl.maximum(most, own_score)
        kept, added = tl.exp2(most - top), tl.exp2(own_score - top)
        acc = acc * kept[:, None] + added[:, None] * new_value[None, :].to(tl.float32)
        total = total * kept + added
        most = top
    part = (slot * KV_HEADS + head) * GROUPS + row + chunk * tl.num_programs(0) * GROUPS
    tl.store(sums + part[:, None].to(tl.int64) * size + channel[None, :], acc, mask=row[:, None] < GROUPS)
    tl.store(largest + part, most, mask=row < GROUPS)
    tl.store(totals + part, total, mask=row < GROUPS)


@triton.jit
def _together(sums, largest, totals, position, out, HEADS: tl.constexpr, SIZE: tl.constexpr, CHUNK: tl.constexpr):
    """Put the chunks of one query head of one slot together, up to the slot's position."""
    row, channel = tl.program_id(0), tl.arange(0, SIZE)
    at = tl.load(position + row // HEADS).to(tl.int32)
    most = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    acc = tl.zeros([SIZE], tl.float32)
    for chunk in range(at // CHUNK + 1):
        part = row + chunk * tl.num_programs(0) + tl.arange(0, 1)
        of_chunk = tl.load(largest + part)
        higher = tl.maximum(most, of_chunk)
        known = tl.where(higher == float("-inf"), 0.0, higher)  # a window may leave nothing of a chunk
        fade, weight = tl.exp2(most - known), tl.exp2(of_chunk - known)
        acc = acc * fade + weight * tl.load(sums + part.to(tl.int64) * SIZE + channel)
        total = total * fade + weight * tl.load(totals + part)
        most = higher
    acc = tl.div_rn(acc, tl.broadcast_to(total, [SIZE]))
    tl.store(out + row.to(tl.int64) * SIZE + channel, acc.to(out.dtype.element_ty))


def attend(
    qkv: Tensor, cos: Tensor, sin: Tensor, position: Tensor, keys: Tensor, values: Tensor, window: int | None
) -> Tensor:
    """Put the tokens into the cache and let them attend to all up to themselves; see ``datagen.attention.Attention``.

    Args:
        keys, values: [slots, kv_heads, max_length, head_dim]
    """
    slots, kv_heads, max_length, size = keys.shape
    heads = qkv.shape[1] // size - 2 * kv_heads
    chunks = -(-max_length // CHUNK)
    sums = torch.empty(chunks, slots * heads, size, dtype=torch.float32, device=qkv.device)
    largest, totals = torch.empty(2, chunks, slots * heads, dtype=torch.float32, device=qkv.device)
    out = torch.empty(slots, heads * size, dtype=qkv.dtype, device=qkv.device)
    groups = heads // kv_heads
    rows = max(_LEAST_ROWS, triton.next_power_of_2(groups))
    scale = math.log2(math.e) / math.sqrt(size)
    with current(qkv):
        _attend[slots * kv_heads, chunks](
            qkv, cos, sin, position, keys, values, sums, largest, totals, scale, max_length,
            kv_heads, groups, rows, size // 2, window or 0, CHUNK, _BLOCK, num_warps=4, **_UNFUSED,
        )  # fmt: skip
        _together[slots * heads,](sums, largest, totals, position, out, heads, size, CHUNK, num_warps=1, **_UNFUSED)
    return out
