"""What stands before and behind a decode step's latent attention, a kernel each (Triton backend).

Before it, queries are led into the space of the latents and rotated, and the tokens' own latents normed and
rotated beside them. Behind it, what splits saw is merged and led out of that space. XLA makes six launches of
it, each of which waits for the one before.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Float32, Int32

from lmdeploy_jax.pallas_kernels.blocks import dot
from lmdeploy_jax.pallas_kernels.heads import partner_of
from lmdeploy_jax.pallas_kernels.launch import Launch, launch
from lmdeploy_jax.pallas_kernels.norm.pallas import inverse_rms, weigh
from lmdeploy_jax.pallas_kernels.paged_attention.pallas import MIN_ROWS

LATENTS, VALUES = 64, 32  # of a latent's, and of a head's value's elements, those that a program makes
MOST_ROWS = 64  # tokens of a program that leads queries
CHUNK = 128  # elements of a latent that are merged at once, of several tokens


def latent_queries(
    parts: Float[Array, "S T H D"],
    latents: Float[Array, "T L"],
    norm: Float[Array, "R"],
    kv_b: Float[Array, "H N R"],
    cos: Float32[Array, "T half"] | None,
    sin: Float32[Array, "T half"] | None,
    eps: float,
    *,
    interpret: bool,
) -> tuple[Float[Array, "T H L"], Float[Array, "T L"]]:
    """See `lmdeploy_jax.pallas_kernels.latent_attention`."""
    _, tokens, heads, _ = parts.shape
    rows = min(max(MIN_ROWS, pl.next_power_of_2(tokens)), MOST_ROWS)
    grid = (heads + 1, pl.cdiv(norm.size, LATENTS), pl.cdiv(tokens, rows))
    how = Launch("latent_queries", grid, num_warps=4, num_stages=1)
    shapes = (tokens, heads, latents.shape[1]), latents.shape
    out = [jax.ShapeDtypeStruct(shape, latents.dtype) for shape in shapes]
    kernel = functools.partial(_queries_kernel, rows=rows, eps=eps)
    queries, latents = launch(kernel, how, out, parts, latents, norm, kv_b, cos, sin, interpret=interpret)
    return queries, latents


def latent_values(
    parts: Float[Array, "S T H R"],
    lse: Float32[Array, "S T H"],
    kv_b: Float[Array, "H N R"],
    value_dim: int,
    dtype: DTypeLike,
    *,
    interpret: bool,
) -> Float[Array, "T H V"]:
    """The values of heads whose outputs splits have seen `parts` of."""
    _, tokens, heads, _ = parts.shape
    rows = 1 if tokens == 1 else MIN_ROWS
    grid = (heads, pl.cdiv(value_dim, VALUES), pl.cdiv(tokens, rows))
    how = Launch("latent_values", grid, num_warps=4, num_stages=1)
    out = jax.ShapeDtypeStruct((tokens, heads, value_dim), dtype)
    kernel = functools.partial(_values_kernel, rows=rows)
    return launch(kernel, how, out, parts, lse, kv_b, interpret=interpret)


def _queries_kernel(
    parts_ref: jax.Ref,
    both_ref: jax.Ref,
    norm_ref: jax.Ref,
    kv_b_ref: jax.Ref,
    cos_ref: jax.Ref | None,
    sin_ref: jax.Ref | None,
    queries_ref: jax.Ref,
    latents_ref: jax.Ref,
    *,
    rows: int,
    eps: float,
) -> None:
    """A program leads a head's queries into a block of columns; those of one head more make the latents."""
    head, block, first = pl.program_id(0), pl.program_id(1), pl.program_id(2) * rows
    (_, tokens, heads, width), rank = parts_ref.shape, norm_ref.shape[0]
    tail = both_ref.shape[1] - rank
    turn = functools.partial(_rotated, count=tail, cos_ref=cos_ref, sin_ref=sin_ref)

    @pl.when(head < heads)
    def _lead() -> None:
        token = first + jnp.arange(rows, dtype=jnp.int32)
        query = _Query(parts_ref, token, head, width - tail, queries_ref.dtype)
        column = block * LATENTS + jnp.arange(LATENTS, dtype=jnp.int32)
        led = dot(query.plain(), query.weight(kv_b_ref, column, rank)).astype(queries_ref.dtype)
        at = queries_ref.at[token[:, None], head, column[None, :]]
        plt.store(at, led, mask=_mask(token < tokens, column < rank))
        column, turned = turn(query.turning, token, token < tokens)
        at = queries_ref.at[token[:, None], head, rank + column[None, :]]
        plt.store(at, turned, mask=_mask((token < tokens) & (block == 0), column < tail))

    @pl.when(head == heads)
    def _make_latents() -> None:
        each = pl.next_power_of_2(pl.cdiv(rows, pl.cdiv(rank, LATENTS)))
        token = first + block * each + jnp.arange(each, dtype=jnp.int32)
        there = token < jnp.minimum(first + rows, tokens)
        column, normed = _numbers(rank), _normed(both_ref, norm_ref, token, there, eps)
        plt.store(latents_ref.at[token[:, None], column[None, :]], normed, mask=_mask(there, column < rank))

        def read(column: jax.Array, mask: jax.Array) -> jax.Array:
            return plt.load(both_ref.at[token[:, None], rank + column], mask=mask, other=0)

        column, turned = turn(read, token, there)
        at = latents_ref.at[token[:, None], rank + column[None, :]]
        plt.store(at, turned, mask=_mask(there, column < tail))


@dataclass(frozen=True)
class _Query:
    """Rows of a head's query, whose parts are added up: first `nope` elements, then those that rotate."""

    parts: jax.Ref
    token: Int32[Array, "rows"]
    head: Int32[Array, ""]
    nope: int
    dtype: jnp.dtype

    def plain(self) -> Float[Array, "rows P"]:
        element = _numbers(self.nope)
        there = self.token < self.parts.shape[1]
        return self._read(element[None, :], _mask(there, element < self.nope))

    def weight(self, ref: jax.Ref, column: Int32[Array, "columns"], rank: int) -> Float[Array, "P columns"]:
        element = _numbers(self.nope)
        at = ref.at[self.head, element[:, None], column[None, :]]
        return plt.load(at, mask=_mask(element < self.nope, column < rank), other=0)

    def turning(self, column: Int32[Array, "1 Rr"], mask: Bool[Array, "rows Rr"]) -> Float[Array, "rows Rr"]:
        return self._read(self.nope + column, mask)

    def _read(self, column: jax.Array, mask: jax.Array) -> jax.Array:
        at = (self.token[:, None], self.head, column)
        parts = range(self.parts.shape[0])
        read = (plt.load(self.parts.at[part, *at], mask=mask, other=0) for part in parts)
        return functools.reduce(jnp.add, read).astype(self.dtype)


def _normed(
    ref: jax.Ref, norm_ref: jax.Ref, token: Int32[Array, "rows"], there: Bool[Array, "rows"], eps: float
) -> Float[Array, "rows R"]:
    """The part of latents that is normed."""
    rank = norm_ref.shape[0]
    column = _numbers(rank)
    latents = plt.load(ref.at[token[:, None], column[None, :]], mask=_mask(there, column < rank), other=0)
    weight = plt.load(norm_ref.at[column], mask=column < rank, other=0)
    wide = latents.astype(jnp.float32)
    return weigh(wide * inverse_rms(wide, rank, eps), weight[None, :], 0.0, latents.dtype)


def _rotated(
    read: Callable[[jax.Array, jax.Array], jax.Array],
    token: Int32[Array, "rows"],
    there: Bool[Array, "rows"],
    *,
    count: int,
    cos_ref: jax.Ref | None,
    sin_ref: jax.Ref | None,
) -> tuple[Int32[Array, "Rr"], Float[Array, "rows Rr"]]:
    """The columns of what is read, of which there are `count`, and that as `rope_kv_write` rotates."""
    number = _numbers(count)
    column, mask = number[None, :], _mask(there, number < count)
    plain = read(column, mask)
    if cos_ref is None or sin_ref is None:
        return number, plain
    half = cos_ref.shape[1]
    partners, turns = read(partner_of(column, half), mask), mask & (column < 2 * half)
    at = token[:, None], jnp.broadcast_to(jnp.where(column < half, column, column - half), mask.shape)
    cos = plt.load(cos_ref.at[at], mask=turns, other=1.0)
    sin = plt.load(sin_ref.at[at], mask=turns, other=0.0)
    sin = jnp.where(column < half, -sin, sin)
    return number, (plain.astype(jnp.float32) * cos + partners.astype(jnp.float32) * sin).astype(plain.dtype)


def _values_kernel(
    parts_ref: jax.Ref, lse_ref: jax.Ref, kv_b_ref: jax.Ref, out_ref: jax.Ref, *, rows: int
) -> None:
    """A program makes a block of a head's values; of one token the products' rows are all the same."""
    head, block = pl.program_id(0), pl.program_id(1)
    (_, tokens, _, rank), size = parts_ref.shape, out_ref.shape[2]
    token = pl.program_id(2) * rows + jnp.arange(rows, dtype=jnp.int32)
    value, there = block * VALUES + jnp.arange(VALUES, dtype=jnp.int32), token < tokens
    shares = _shares(lse_ref, token, head)
    row = kv_b_ref.shape[1] - size + value
    chunk = _numbers(rank).size if rows == 1 else min(CHUNK, _numbers(rank).size)
    total = jnp.zeros((VALUES, MIN_ROWS), jnp.float32)
    for first in range(0, rank, chunk):
        column = first + jnp.arange(chunk, dtype=jnp.int32)
        at, mask = (token[:, None], head, column[None, :]), _mask(there, column < rank)
        seen = (
            plt.load(parts_ref.at[split, *at], mask=mask, other=0).astype(jnp.float32) * share[:, None]
            for split, share in enumerate(shares)
        )
        merged = jnp.broadcast_to(functools.reduce(jnp.add, seen).astype(out_ref.dtype), (MIN_ROWS, chunk))
        at = kv_b_ref.at[head, row[:, None], column[None, :]]
        weight = plt.load(at, mask=_mask(value < size, column < rank), other=0)
        total += dot(weight, merged.T)
    place = pl.program_id(2) * rows + jnp.arange(MIN_ROWS, dtype=jnp.int32)
    inside = (place < tokens) & (place < pl.program_id(2) * rows + rows)
    at = out_ref.at[place[None, :], head, value[:, None]]
    plt.store(at, total.astype(out_ref.dtype), mask=_mask(value < size, inside))


def _shares(
    lse_ref: jax.Ref, token: Int32[Array, "rows"], head: Int32[Array, ""]
) -> list[Float32[Array, "rows"]]:
    """What each split counts for: it is like one key, its output the value. Those that saw nothing are lost
    beside the others.
    """
    splits, tokens, _ = lse_ref.shape
    there = token < tokens
    lse = [plt.load(lse_ref.at[split, token, head], mask=there, other=0.0) for split in range(splits)]
    most = functools.reduce(jnp.maximum, lse)
    raised = [jnp.exp2(each - most) for each in lse]
    total = functools.reduce(jnp.add, raised)
    return [each / total for each in raised]


def _numbers(count: int) -> Int32[Array, "padded"]:
    return jnp.arange(max(MIN_ROWS, pl.next_power_of_2(count)), dtype=jnp.int32)


def _mask(rows: Bool[Array, "rows"], columns: Bool[Array, "columns"]) -> Bool[Array, "rows columns"]:
    return rows[:, None] & columns[None, :]
