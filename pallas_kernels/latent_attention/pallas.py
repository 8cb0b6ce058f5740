"""Latent attention in Pallas (Triton backend), in the space of the latents.

A page is read once for the keys and the values of a block of heads. Its columns come as two blocks, since
Triton's have powers of two: the first `rank`, which are values too, and the rotated others.

Decode splits a sequence's pages over programs as `paged_attention` does, and a second launch merges what they
saw. The programs that have a sequence's newest page write the new token's latent first, each the same, and
read it back behind a barrier. In prefill a block's rows are (query, head) pairs.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Float32, Int32

from lmdeploy_jax.pallas_kernels.blocks import attend_logits, dot, initial_state, normalised
from lmdeploy_jax.pallas_kernels.launch import Launch, launch
from lmdeploy_jax.pallas_kernels.options import AttentionOptions
from lmdeploy_jax.pallas_kernels.paged_attention.pallas import MIN_ROWS, split_count, split_pages
from lmdeploy_jax.pallas_kernels.prefill_attention.tiles import TILE_ROWS
from lmdeploy_jax.pallas_kernels.shapes import PlainPages, Slots, Softmax, Tiles

PROGRAMS, SPLITS = 264, 64  # to aim at in decode, and at most of a sequence: as measured on an H200


@dataclass(frozen=True)
class Tuning:
    """Heads, or (query, head) rows, and keys of a block; Triton's warps and pipeline stages; in decode how
    many programs to aim at, and how many a sequence has at most.
    """

    rows: int
    keys: int
    num_warps: int
    num_stages: int
    programs: int = PROGRAMS
    splits: int = SPLITS


def decode(
    q: Float[Array, "T H D"],
    latents: Float[Array, "T D"],
    pages: PlainPages,
    slots: Slots,
    page_table: Int32[Array, "T M"],
    kv_lens: Int32[Array, "T"],
    rank: int,
    options: AttentionOptions,
    *,
    tuning: Tuning | None = None,
    interpret: bool,
) -> tuple[Float[Array, "T H R"], PlainPages]:
    """One token a sequence, whose latent is written first."""
    tokens, heads, _ = q.shape
    usual = Tuning(16, 16, 4, 1) if pages.dtype == jnp.float32 else Tuning(16, 32, 4, 3)
    tuning = tuning or usual
    blocks = pl.cdiv(heads, tuning.rows)
    splits = split_count(tokens * blocks, page_table.shape[1], tuning.programs, tuning.splits)
    how = Launch(
        "latent_attention", (blocks, splits, tokens), tuning.num_warps, tuning.num_stages, aliases={0: 0}
    )
    out = [
        jax.ShapeDtypeStruct(pages.shape, pages.dtype),
        jax.ShapeDtypeStruct((splits, tokens, heads, rank), q.dtype if splits == 1 else jnp.float32),
        jax.ShapeDtypeStruct((splits, tokens, heads), jnp.float32),
    ]
    kernel = functools.partial(_decode_kernel, rank=rank, tuning=tuning, options=options, interpret=interpret)
    arrays = (pages, q, latents.astype(pages.dtype), slots, page_table, kv_lens)
    pages, parts, lse = launch(kernel, how, out, *arrays, interpret=interpret)
    return parts[0] if splits == 1 else _merge(parts, lse, q.dtype, interpret=interpret), pages


def prefill(
    q: Float[Array, "T H D"],
    pages: PlainPages,
    page_table: Int32[Array, "S M"],
    tiles: Tiles,
    rank: int,
    options: AttentionOptions,
    *,
    interpret: bool,
) -> Float[Array, "T H R"]:
    """Packed chunks, whose latents the cache already holds."""
    tokens, heads, _ = q.shape
    tuning = Tuning(16, 16, 4, 1) if pages.dtype == jnp.float32 else Tuning(64, 32, 8, 2)
    grid = (
        pl.cdiv(TILE_ROWS["pallas"], max(tuning.rows // heads, 1)),
        pl.cdiv(heads, tuning.rows),
        tiles.shape[0],
    )
    # Rows that no tile covers stay zero: what they were might not be finite.
    how = Launch("latent_prefill_attention", grid, tuning.num_warps, tuning.num_stages, aliases={0: 0})
    kernel = functools.partial(_prefill_kernel, rank=rank, tuning=tuning, options=options)
    zeros = jnp.zeros((tokens, heads, rank), q.dtype)
    out = jax.ShapeDtypeStruct(zeros.shape, zeros.dtype)
    return launch(kernel, how, out, zeros, q, pages, page_table, tiles, interpret=interpret)


def _decode_kernel(
    _pages_in: jax.Ref,
    q_ref: jax.Ref,
    latents_ref: jax.Ref,
    slots_ref: jax.Ref,
    table_ref: jax.Ref,
    lens_ref: jax.Ref,
    pages_ref: jax.Ref,
    parts_ref: jax.Ref,
    lse_ref: jax.Ref,
    *,
    rank: int,
    tuning: Tuning,
    options: AttentionOptions,
    interpret: bool,
) -> None:
    block, split, token = (pl.program_id(axis) for axis in range(3))
    split_of = split_pages(lens_ref[token], pages_ref.shape[2], options)
    columns = _Columns(rank, pages_ref.shape[3])

    @pl.when(split == split_of.splits - 1)
    def _write() -> None:
        page, offset = (f(jnp.maximum(slots_ref[token], 0), pages_ref.shape[2]) for f in (lax.div, lax.rem))
        columns.copy(latents_ref, (token,), pages_ref, (page, 0, offset))

    if not interpret:
        plt.debug_barrier()
    head = block * tuning.rows + jnp.arange(tuning.rows, dtype=jnp.int32)
    valid = head < q_ref.shape[1]
    queries = columns.read(q_ref, (token, head[:, None]), valid, pages_ref.dtype)
    keys = _Keys(pages_ref, table_ref, token, columns, tuning.keys)

    def step(index: jax.Array, state: Softmax) -> Softmax:
        position = keys.positions(index)
        visible = (position < split_of.length) & (position >= split_of.oldest)
        return keys.attend(state, queries, index, visible[None, :], visible, options)

    each = pages_ref.shape[2] // tuning.keys  # blocks of a page
    begin, end = split_of.begin * each, lax.div(split_of.length + tuning.keys - 1, tuning.keys)
    state = initial_state(tuning.rows, columns.sizes[0])
    state = lax.fori_loop(begin, jnp.minimum(split_of.end * each, end), step, state)
    maximum, denominator, _ = state
    out = normalised(state).astype(parts_ref.dtype)
    columns.store(parts_ref, (split, token, head[:, None]), valid, out)
    lse = maximum + jnp.log2(jnp.maximum(denominator, 1e-30))
    plt.store(lse_ref.at[split, token, head], lse, mask=valid)


def _merge(
    parts: Float32[Array, "S T H R"], lse: Float32[Array, "S T H"], dtype: jnp.dtype, *, interpret: bool
) -> Float[Array, "T H R"]:
    _, tokens, heads, rank = parts.shape
    how = Launch("merge_latent_attention", (heads, tokens), num_warps=4, num_stages=1)
    out = jax.ShapeDtypeStruct((tokens, heads, rank), dtype)
    return launch(_merge_kernel, how, out, parts, lse, interpret=interpret)


def _merge_kernel(parts_ref: jax.Ref, lse_ref: jax.Ref, out_ref: jax.Ref) -> None:
    """Each split is like one key, its output the value. Those that saw nothing are lost beside the others."""
    head, token = pl.program_id(0), pl.program_id(1)
    splits, rank = parts_ref.shape[0], parts_ref.shape[3]
    column = jnp.arange(pl.next_power_of_2(rank), dtype=jnp.int32)
    mask = column < rank
    lse = lse_ref[:, token, head]
    maximum = jnp.max(lse)
    total = jnp.zeros(column.shape, jnp.float32)
    for split in range(splits):
        part = plt.load(parts_ref.at[split, token, head, column], mask=mask, other=0.0)
        total += part * jnp.exp2(lse_ref[split, token, head] - maximum)
    out = total / jnp.sum(jnp.exp2(lse - maximum))
    plt.store(out_ref.at[token, head, column], out.astype(out_ref.dtype), mask=mask)


def _prefill_kernel(
    _zeros: jax.Ref,
    q_ref: jax.Ref,
    pages_ref: jax.Ref,
    table_ref: jax.Ref,
    tiles_ref: jax.Ref,
    out_ref: jax.Ref,
    *,
    rank: int,
    tuning: Tuning,
    options: AttentionOptions,
) -> None:
    index, block, tile = (pl.program_id(axis) for axis in range(3))
    table_row, start, count, position = (tiles_ref[tile, column] for column in range(4))
    heads = min(q_ref.shape[1], tuning.rows)  # of the block's queries
    first = index * (tuning.rows // heads)

    @pl.when(first < count)
    def _attend() -> None:
        row = jnp.arange(tuning.rows, dtype=jnp.int32)
        query, head = first + lax.div(row, heads), block * heads + lax.rem(row, heads)
        valid = (row < tuning.rows // heads * heads) & (query < count) & (head < q_ref.shape[1])
        columns = _Columns(rank, pages_ref.shape[3])
        at = ((start + query)[:, None], head[:, None])
        queries = columns.read(q_ref, at, valid, pages_ref.dtype)
        keys = _Keys(pages_ref, table_ref, table_row, columns, tuning.keys)
        newest = position + jnp.minimum(first + tuning.rows // heads, count) - 1

        def step(number: jax.Array, state: Softmax) -> Softmax:
            key = keys.positions(number)
            age = (position + query)[:, None] - key[None, :]
            visible = age >= 0 if options.window is None else (age >= 0) & (age < options.window)
            return keys.attend(state, queries, number, visible, key <= newest, options)

        oldest = position + first
        begin = 0 if options.window is None else jnp.maximum(oldest - options.window + 1, 0)
        span = lax.div(jnp.int32(begin), tuning.keys), lax.div(newest, tuning.keys) + 1
        state = lax.fori_loop(*span, step, initial_state(tuning.rows, columns.sizes[0]))
        columns.store(out_ref, at, valid, normalised(state).astype(out_ref.dtype))


Parts = tuple[jax.Array, jax.Array]
Place = tuple[jax.Array | int, ...]


class _Columns:
    """A latent's columns in two blocks, padded to powers of two: what is a value too, and the rest."""

    def __init__(self, rank: int, width: int) -> None:
        self.counts = rank, width - rank
        self.sizes = tuple(max(MIN_ROWS, pl.next_power_of_2(count)) for count in self.counts)

    def read(self, ref: jax.Ref, rows: Place, valid: jax.Array | None, dtype: jnp.dtype) -> Parts:
        """The rows' two blocks; zeros where none is `valid`, which None says that all are."""
        return tuple(self._read(ref, rows, valid, part).astype(dtype) for part in range(2))  # type: ignore

    def _read(self, ref: jax.Ref, rows: Place, valid: jax.Array | None, part: int) -> jax.Array:
        column = jnp.arange(self.sizes[part], dtype=jnp.int32)
        at = ref.at[(*rows, (part * self.counts[0] + column)[None, :])]
        mask = self._mask(valid, part)
        return plt.load(at) if mask is None else plt.load(at, mask=mask, other=0)

    def _mask(self, valid: jax.Array | None, part: int) -> jax.Array | None:
        whole = self.sizes[part] == self.counts[part]
        if valid is None:
            return None if whole else jnp.arange(self.sizes[part])[None, :] < self.counts[part]
        mask = jnp.broadcast_to(valid[:, None], (valid.size, self.sizes[part]))
        return mask if whole else mask & (jnp.arange(self.sizes[part])[None, :] < self.counts[part])

    def store(self, ref: jax.Ref, rows: Place, valid: jax.Array, out: Float[Array, "N R"]) -> None:
        """The rows' values."""
        column = jnp.arange(self.sizes[0], dtype=jnp.int32)
        plt.store(ref.at[(*rows, column[None, :])], out, mask=self._mask(valid, 0))

    def copy(self, source: jax.Ref, row: Place, target: jax.Ref, place: Place) -> None:
        """One latent."""
        for part, (size, count) in enumerate(zip(self.sizes, self.counts, strict=True)):
            column = jnp.arange(size, dtype=jnp.int32)
            at, mask = part * self.counts[0] + column, column < count
            value = plt.load(source.at[(*row, at)], mask=mask, other=0)
            plt.store(target.at[(*place, at)], value, mask=mask)


@dataclass(frozen=True)
class _Keys:
    """A sequence's latents in blocks of `size`, which divides a page."""

    pages: jax.Ref
    table: jax.Ref
    table_row: jax.Array
    columns: _Columns
    size: int

    def positions(self, index: jax.Array) -> Int32[Array, "P"]:
        """Of a block's keys."""
        return index * self.size + jnp.arange(self.size, dtype=jnp.int32)

    def attend(
        self,
        state: Softmax,
        queries: Parts,
        index: jax.Array,
        visible: jax.Array,
        held: jax.Array,
        options: AttentionOptions,
    ) -> Softmax:
        """Adds a block to the queries' softmax. `held`: which of its slots the sequence has filled."""
        position = self.positions(index)
        page_size = self.pages.shape[2]
        page = self.table[self.table_row, lax.div(index * self.size, page_size)]
        rows = (page, 0, lax.rem(position, page_size)[:, None])
        latents, tails = self.columns.read(self.pages, rows, held, self.pages.dtype)
        logits = dot(queries[0], latents.T) + dot(queries[1], tails.T)
        return attend_logits(state, logits, latents, visible, options)
