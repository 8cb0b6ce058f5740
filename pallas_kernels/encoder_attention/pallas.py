"""Encoder attention in Pallas (Triton backend): FlashAttention-2 (Dao, 2023), both ways.

A program takes a block of queries of one head and walks over the keys that any of them sees: no scores reach
memory, and q, k and v are read where one product has left them. A last block of queries or keys with few
patches is as small as they allow: views of 32 x 32 patches and a class token leave one behind eight blocks.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Bool, Float, Int32

from lmdeploy_jax.pallas_kernels.blocks import LOG2E, dot, initial_state, normalised
from lmdeploy_jax.pallas_kernels.launch import Launch, launch
from lmdeploy_jax.pallas_kernels.options import MASKED
from lmdeploy_jax.pallas_kernels.shapes import Softmax

SMALL = 16  # the least rows of a product
SHORT = 2048  # patches up to which small blocks of queries measured faster
NOBODYS = -2  # the segment of what stands behind a sequence's end
BEYOND = 2**30  # above every segment


@dataclass(frozen=True)
class Tuning:
    """Queries of a program, keys at a time; Triton's warps and pipeline stages."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int


def encoder_attention(
    qkv: Float[Array, "B N 3 H D"],
    segments: Int32[Array, "B N"] | None,
    *,
    tuning: Tuning | None = None,
    interpret: bool,
) -> Float[Array, "B N H D"]:
    """See `lmdeploy_jax.pallas_kernels.encoder_attention`."""
    batch, count, _, heads, head_dim = qkv.shape
    tuning = tuning or _tuning(count, head_dim, qkv.dtype)
    ranges = None if segments is None else _key_ranges(segments, tuning)
    grid = (pl.cdiv(count, tuning.queries), heads, batch)
    how = Launch("encoder_attention", grid, tuning.num_warps, tuning.num_stages)
    kernel = functools.partial(_kernel, tuning=tuning, scale=head_dim**-0.5 * LOG2E)
    out = jax.ShapeDtypeStruct((batch, count, heads, head_dim), qkv.dtype)
    return launch(kernel, how, out, qkv, segments, ranges, interpret=interpret)


def _tuning(count: int, head_dim: int, dtype: jnp.dtype) -> Tuning:
    most = max(SMALL, pl.next_power_of_2(count))
    if dtype == jnp.float32:
        return Tuning(min(32, most), min(32, most), 4, 2)
    if head_dim > 128:
        return Tuning(min(64, most), min(64, most), 8, 2)
    if head_dim > 64:
        return Tuning(min(128, most), min(64, most), 8, 3)
    return Tuning(min(64 if count <= SHORT else 128, most), min(64, most), 4, 3)


def _key_ranges(segments: Int32[Array, "B N"], tuning: Tuning) -> Int32[Array, "B blocks 2"]:
    """For each block of queries, the first block of keys with a segment that it has, and past the last."""
    low, high = (_blockwise(segments, tuning.queries, last) for last in (False, True))
    key_low, key_high = (_blockwise(segments, tuning.keys, last) for last in (False, True))
    before = lax.cummax(key_high, axis=1)[:, None] < low[..., None]
    reached = lax.cummin(key_low, axis=1, reverse=True)[:, None] <= high[..., None]
    return jnp.stack([before.sum(axis=2, dtype=jnp.int32), reached.sum(axis=2, dtype=jnp.int32)], axis=2)


def _blockwise(segments: Int32[Array, "B N"], size: int, last: bool) -> Int32[Array, "B blocks"]:
    """The first or last segment of each block, padding passed over."""
    batch, count = segments.shape
    padded = jnp.pad(segments, ((0, 0), (0, -count % size)), constant_values=-1).reshape(batch, -1, size)
    return padded.max(axis=2) if last else jnp.where(padded < 0, BEYOND, padded).min(axis=2)


def _kernel(
    qkv_ref: jax.Ref,
    segments_ref: jax.Ref | None,
    ranges_ref: jax.Ref | None,
    o_ref: jax.Ref,
    *,
    tuning: Tuning,
    scale: float,
) -> None:
    index, head, batch = (pl.program_id(axis) for axis in range(3))
    whole, rest = divmod(qkv_ref.shape[1], tuning.queries)
    part = _Sequence(qkv_ref, segments_ref, batch, head)

    def attend(size: int) -> None:
        begin = end = None
        if ranges_ref is not None:
            begin, end = ranges_ref[batch, index, 0], ranges_ref[batch, index, 1]
        _attend_block(part, o_ref, index * tuning.queries, size, (begin, end), tuning.keys, scale)

    if not 0 < rest <= SMALL:
        attend(tuning.queries)
        return
    pl.when(index < whole)(lambda: attend(tuning.queries))
    pl.when(index == whole)(lambda: attend(SMALL))


@dataclass(frozen=True)
class _Sequence:
    """One head of one sequence."""

    qkv_ref: jax.Ref
    segments_ref: jax.Ref | None
    batch: jax.Array
    head: jax.Array

    @property
    def count(self) -> int:
        return self.qkv_ref.shape[1]

    def at(self, ref: jax.Ref, patches: jax.Array, *part: int) -> tuple[Any, Bool[Array, "N D"]]:
        """Where these patches of `ref` [B, N, ..., H, D] are, and which elements there are."""
        head_dim = ref.shape[-1]
        column = jnp.arange(pl.next_power_of_2(head_dim), dtype=jnp.int32)[None, :]
        mask = (patches[:, None] < self.count) & (column < head_dim)
        return ref.at[self.batch, patches[:, None], *part, self.head, column], mask

    def load(self, first: jax.Array | int, size: int, part: int, *, whole: bool) -> Float[Array, "N D"]:
        """q, k or v of `size` patches, zeros for what there is not. whole: all of them are there."""
        if whole and pl.next_power_of_2(self.qkv_ref.shape[-1]) == self.qkv_ref.shape[-1]:
            return self.qkv_ref[self.batch, pl.ds(first, size), part, self.head]
        at, mask = self.at(self.qkv_ref, first + jnp.arange(size, dtype=jnp.int32), part)
        return plt.load(at, mask=mask, other=0)

    def owners(self, first: jax.Array | int, size: int) -> Int32[Array, "N"] | None:
        """The segments of `size` patches."""
        if self.segments_ref is None:
            return None
        patches = first + jnp.arange(size, dtype=jnp.int32)
        return plt.load(self.segments_ref.at[self.batch, patches], mask=patches < self.count, other=NOBODYS)


def _attend_block(
    part: _Sequence,
    o_ref: jax.Ref,
    first: jax.Array,
    size: int,
    key_range: tuple[jax.Array | None, jax.Array | None],
    keys: int,
    scale: float,
) -> None:
    q = part.load(first, size, 0, whole=part.count % size == 0)
    own = part.owners(first, size)

    def step(block: jax.Array | int, state: Softmax, *, length: int, whole: bool) -> Softmax:
        at = block * keys
        k, v = (part.load(at, length, number, whole=whole) for number in (1, 2))
        return _attend(state, q, k, v, _visible(part, own, at, length, whole), scale)

    whole, rest = divmod(part.count, keys)
    begin, end = key_range
    last = whole if end is None else jnp.minimum(end, whole)
    state = initial_state(size, q.shape[1])
    each = functools.partial(step, length=keys, whole=True)
    if whole:
        state = lax.fori_loop(jnp.int32(0) if begin is None else begin, last, each, state)
    if rest:
        state = step(whole, state, length=max(SMALL, pl.next_power_of_2(rest)), whole=False)
    at, mask = part.at(o_ref, first + jnp.arange(size, dtype=jnp.int32))
    plt.store(at, normalised(state).astype(o_ref.dtype), mask=mask)


def _attend(
    state: Softmax,
    q: Float[Array, "N D"],
    keys: Float[Array, "P D"],
    values: Float[Array, "P D"],
    visible: Bool[Array, "#N P"] | None,
    scale: float,
) -> Softmax:
    """Adds keys and values to the softmax, whose maximum is of logits before they are scaled: then a scaled
    logit less the maximum is one instruction.
    """
    maximum, denominator, out = state
    logits = dot(q, keys.T)
    if visible is not None:
        logits = jnp.where(visible, logits, MASKED)
    new_maximum = jnp.maximum(maximum, jnp.max(logits, axis=1))
    decay = jnp.exp2((maximum - new_maximum) * scale)
    weights = jnp.exp2(logits * scale - (new_maximum * scale)[:, None])
    new_out = out * decay[:, None] + dot(weights.astype(values.dtype), values)
    return new_maximum, denominator * decay + jnp.sum(weights, axis=1), new_out


def _visible(
    part: _Sequence, own: jax.Array | None, at: jax.Array | int, length: int, whole: bool
) -> Bool[Array, "#N P"] | None:
    """Which of `length` keys from `at` on each query sees; None: all."""
    theirs = part.owners(at, length)
    if own is not None and theirs is not None:
        return own[:, None] == theirs[None, :]
    key = at + jnp.arange(length, dtype=jnp.int32)
    return None if whole else (key < part.count)[None, :]
