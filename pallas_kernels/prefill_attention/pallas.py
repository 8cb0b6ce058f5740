"""Ragged prefill attention in Pallas (Triton backend): FlashAttention-2 over pages.

A program takes a block of rows of one tile and one KV head: each row is a (query, query head of that KV head)
pair, so that K and V are read once for all of them and short chunks still fill the tensor cores. Pages that
every row sees whole run unmasked; those at the causal diagonal and at the edge of the window run masked.
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
from jaxtyping import Array, Float, Int32

from lmdeploy_jax.pallas_kernels.blocks import LONG_HEAD, add_sink, normalised
from lmdeploy_jax.pallas_kernels.cache_refs import CacheRefs, Queries, cache_refs
from lmdeploy_jax.pallas_kernels.launch import Launch, launch
from lmdeploy_jax.pallas_kernels.options import AttentionOptions
from lmdeploy_jax.pallas_kernels.prefill_attention.tiles import SHORT, TILE_ROWS
from lmdeploy_jax.pallas_kernels.shapes import Pages, Sinks, Softmax, Tiles

SMALL_BLOCK = 16  # rows of the block that serves short tiles


@dataclass(frozen=True)
class Tuning:
    """Rows of a block; Triton's warps and pipeline stages."""

    block: int
    num_warps: int
    num_stages: int


def prefill_attention(
    q: Float[Array, "T H D"],
    k_pages: Pages,
    v_pages: Pages,
    page_table: Int32[Array, "S M"],
    tiles: Tiles,
    sinks: Sinks | None,
    lookahead: Int32[Array, "T"] | None,
    options: AttentionOptions,
    *,
    tuning: Tuning | None = None,
    only_short: bool = False,
    few_long: bool = False,
    interpret: bool,
) -> Float[Array, "T H D"]:
    """See `lmdeploy_jax.pallas_kernels.prefill_attention`; the rows of long tiles may be left alone. Where
    there are `few_long`, a program takes all blocks of its tile: most would have nothing to do.
    """
    kv_heads = k_pages.shape[1]
    group = q.shape[1] // kv_heads
    tuning = tuning or _tuning(q.shape[2], k_pages.dtype)
    block = tuning.block
    rows = SHORT if only_short else TILE_ROWS["pallas"]
    blocks = pl.cdiv(rows, (SMALL_BLOCK if only_short else block) // group)
    # The output takes the queries' place: a program reads and writes the same rows and heads.
    grid = (1 if few_long else blocks, kv_heads, tiles.shape[0])
    how = Launch("prefill_attention", grid, tuning.num_warps, tuning.num_stages, aliases={0: 0})
    cache, structure = jax.tree.flatten((k_pages, v_pages))
    kernel = functools.partial(
        _kernel,
        cache=structure,
        block=None if only_short else block,
        group=group,
        whole_tiles=few_long,
        options=options,
        interpret=interpret,
    )
    inputs = (q, *cache, page_table, tiles, sinks, lookahead)
    return launch(kernel, how, jax.ShapeDtypeStruct(q.shape, q.dtype), *inputs, interpret=interpret)


def _tuning(head_dim: int, dtype: jnp.dtype) -> Tuning:
    if head_dim > LONG_HEAD:
        return Tuning(16 if dtype == jnp.float32 else 32, 8, 1)
    if dtype == jnp.float32:
        return Tuning(32 if head_dim <= 128 else 16, 8, 2)
    return Tuning(128, 8, 5) if head_dim <= 128 else Tuning(64, 8, 3)


@dataclass(frozen=True)
class _Block:
    """What one program computes: `size` rows, each a (query, head), of the tile's queries from `first` on."""

    size: int
    group: int
    kv_head: jax.Array
    table_row: jax.Array
    start: jax.Array  # of the tile, in the packed queries
    count: jax.Array  # of the tile's queries
    position: jax.Array  # of the tile's first query
    first: jax.Array  # query of the tile


def _kernel(
    q_ref: jax.Ref,
    *refs: Any,
    cache: Any,
    block: int | None,
    group: int,
    whole_tiles: bool,
    options: AttentionOptions,
    interpret: bool,
) -> None:
    """`block` rows for long tiles; None: they are not done. With `whole_tiles` a program takes block after
    block. `cache`: the structure of K and V, whose arrays come first.
    """
    held = cache_refs(jax.tree.unflatten(cache, refs[: cache.num_leaves]), interpret)
    table_ref, tiles_ref, sinks_ref, ahead_ref, o_ref = refs[cache.num_leaves :]
    index, kv_head, tile = (pl.program_id(axis) for axis in range(3))
    table_row, start, count, position = (tiles_ref[tile, column] for column in range(4))

    def run(size: int, enabled: jax.Array) -> None:
        queries = size // group

        def attend(block: jax.Array, _: None) -> None:
            part = _Block(size, group, kv_head, table_row, start, count, position, block * queries)
            _attend_block(q_ref, held, table_ref, sinks_ref, ahead_ref, o_ref, part, options)

        if whole_tiles:
            blocks = lax.div(jnp.where(enabled, count, 0) + queries - 1, queries)
            lax.fori_loop(0, blocks, attend, None)
        else:
            pl.when(enabled & (index * queries < count))(lambda: attend(index, None))

    if block is not None:
        run(block, count > SHORT)
    run(SMALL_BLOCK, count <= SHORT)


def _attend_block(
    q_ref: jax.Ref,
    held: CacheRefs,
    table_ref: jax.Ref,
    sinks_ref: jax.Ref | None,
    ahead_ref: jax.Ref | None,
    o_ref: jax.Ref,
    part: _Block,
    options: AttentionOptions,
) -> None:
    head_dim = q_ref.shape[2]
    row = jnp.arange(part.size, dtype=jnp.int32)
    query = part.first + lax.div(row, part.group)
    valid = (row < part.size // part.group * part.group) & (query < part.count)
    head = part.kv_head * part.group + lax.rem(row, part.group)
    columns = held.columns
    masks = [valid[:, None] & (column < head_dim) for column in columns]
    places = [((part.start + query)[:, None], head[:, None], column) for column in columns]
    blocks = list(zip(places, masks, strict=True))
    q = held.queries([plt.load(q_ref.at[at], mask=mask, other=0) for at, mask in blocks])
    ahead = None
    if ahead_ref is not None:
        ahead = plt.load(ahead_ref.at[part.start + query], mask=valid, other=0)
    state = _attend_pages(q, held, table_ref, part.position + query, ahead, part, options)
    if sinks_ref is not None:
        state = add_sink(state, plt.load(sinks_ref.at[head], mask=valid, other=0.0))
    for (at, mask), out in zip(blocks, jax.tree.leaves(normalised(state)), strict=True):
        plt.store(o_ref.at[at], out.astype(o_ref.dtype), mask=mask)


def _attend_pages(
    q: Queries,
    held: CacheRefs,
    table_ref: jax.Ref,
    positions: jax.Array,
    ahead: jax.Array | None,
    part: _Block,
    options: AttentionOptions,
) -> Softmax:
    """`ahead`: how many positions beyond its own each row sees; None: none does."""
    page_size = held.page_size
    oldest = part.position + part.first
    newest = part.position + jnp.minimum(part.first + part.size // part.group, part.count) - 1
    last = newest if ahead is None else jnp.max(jnp.minimum(positions, newest) + ahead)

    def step(index: jax.Array, state: Softmax, *, masked: bool) -> Softmax:
        page = table_ref[part.table_row, index]
        if not masked:
            return held.attend(state, q, page, part.kv_head, None, None, options)

        def visible(token: jax.Array) -> jax.Array:
            key = index * page_size + token
            age = positions[:, None] - key[None, :]
            seen = age >= 0 if ahead is None else age + ahead[:, None] >= 0
            if options.window is not None:
                seen = seen & (age < options.window)
            if options.chunk is not None:
                seen = seen & (key[None, :] >= first_of_chunk[:, None])
            return seen

        valid = last + 1 - index * page_size
        return held.attend(state, q, page, part.kv_head, valid, visible, options)

    first_of_chunk = _chunk_start(positions, options)
    masked, unmasked = (functools.partial(step, masked=flag) for flag in (True, False))
    begin, unmasked_begin, unmasked_end = _page_ranges(oldest, newest, page_size, options)
    state = held.initial(part.size)
    if options.window is not None or options.chunk is not None:
        state = lax.fori_loop(begin, unmasked_begin, masked, state)
    state = lax.fori_loop(unmasked_begin, unmasked_end, unmasked, state)
    return held.finished(lax.fori_loop(unmasked_end, lax.div(last, page_size) + 1, masked, state))


def _page_ranges(
    oldest: jax.Array, newest: jax.Array, page_size: int, options: AttentionOptions
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Pages that queries `oldest` to `newest` see: (first, first whole, past the whole)."""
    zero = jnp.int32(0)
    unmasked_end = lax.div(oldest + 1, page_size)
    window = options.window
    if options.chunk is not None:
        begin = lax.div(_chunk_start(oldest, options), page_size)
        unmasked_begin = lax.div(_chunk_start(newest, options) + page_size - 1, page_size)
    elif window is not None:
        begin = lax.div(jnp.maximum(oldest - window + 1, zero), page_size)
        unmasked_begin = lax.div(jnp.maximum(newest - window + 1, zero) + page_size - 1, page_size)
    else:
        return zero, zero, unmasked_end
    unmasked_end = jnp.maximum(unmasked_end, begin)
    return begin, jnp.minimum(unmasked_begin, unmasked_end), unmasked_end


def _chunk_start(position: jax.Array, options: AttentionOptions) -> jax.Array:
    """The first position of the chunk of each of `position`; without chunks nobody asks."""
    chunk = options.chunk
    return position if chunk is None else position - lax.rem(position, jnp.full_like(position, chunk))
