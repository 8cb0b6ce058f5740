"""Decode attention in Pallas (Triton backend): split-KV, one program a (KV head, split, sequence).

Flash-decoding (Dao et al., 2023): each split runs an online softmax over its share of a sequence's own pages.
The last one of a sequence to arrive merges them by their log-sum-exp; where one reads all pages, there
is nothing to merge. A tile's rows are the query heads of one KV head.

Each program first makes its queries from the qkv product, and the one with a sequence's newest page the new
token's key and value. It reads them from memory again, behind a barrier, as it reads all others: to bring
the registers of one layout into another takes longer. No other program reads that slot of the cache.
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
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from lmdeploy_jax.pallas_kernels.blocks import LONG_HEAD, add_sink, normalised
from lmdeploy_jax.pallas_kernels.cache_refs import CacheRefs, cache_refs
from lmdeploy_jax.pallas_kernels.heads import HeadRefs, HeadTile
from lmdeploy_jax.pallas_kernels.launch import Launch, launch
from lmdeploy_jax.pallas_kernels.options import MASKED, AttentionOptions
from lmdeploy_jax.pallas_kernels.quant_pages import QuantPages
from lmdeploy_jax.pallas_kernels.rope_kv_write.work import HeadWork
from lmdeploy_jax.pallas_kernels.shapes import Output, Pages, Sinks, Slots, Softmax

MIN_ROWS = 16  # rows of the smallest tensor-core product
MAX_SPLITS = 32
FEW_TILES = 32


@dataclass(frozen=True)
class Tuning:
    """How the work is cut and run: programs to aim at, Triton's warps and pipeline stages."""

    programs: int  # where the tiles alone are more, nothing is split: merging costs more than idle cores
    num_warps: int
    num_stages: int


def paged_attention(
    parts: Float[Array, "S T KH R D"],
    k_pages: Pages,
    v_pages: Pages,
    slots: Slots,
    page_table: Int32[Array, "T M"],
    kv_lens: Int32[Array, "T"],
    split_counters: Int32[Array, "T KH"],
    work: HeadWork,
    sinks: Sinks | None,
    options: AttentionOptions,
    *,
    dtype: DTypeLike,
    tuning: Tuning | None = None,
    interpret: bool,
) -> tuple[Float[Array, "T KH R-2 D"], Pages, Pages, Int32[Array, "T KH"]]:
    """See `lmdeploy_jax.pallas_kernels.paged_attention`."""
    _, tokens, kv_heads, rows, head_dim = parts.shape
    tuning = tuning or _tuning(tokens * kv_heads, head_dim, k_pages.dtype)
    splits = split_count(tokens * kv_heads, page_table.shape[1], tuning.programs)
    cache, structure = jax.tree.flatten((k_pages, v_pages))
    grid = (kv_heads, splits, tokens)
    aliases = {i: i for i in range(1 + len(cache))}
    how = Launch("paged_attention", grid, tuning.num_warps, tuning.num_stages, aliases=aliases)
    heads = (tokens, kv_heads, rows - 2)
    out = [
        *(jax.ShapeDtypeStruct(array.shape, array.dtype) for array in (split_counters, *cache)),
        *[jax.ShapeDtypeStruct((*heads, head_dim), dtype)] * 2,
        jax.ShapeDtypeStruct((splits, *heads, head_dim), jnp.float32),
        jax.ShapeDtypeStruct((splits, *heads), jnp.float32),
    ]
    kernel = functools.partial(
        _kernel, cache=structure, options=options, eps=work.eps, offset=work.offset, interpret=interpret
    )
    arrays = (split_counters, *cache, slots, page_table, kv_lens, sinks, parts, *work.arrays())
    split_counters, *rest = launch(kernel, how, out, *arrays, interpret=interpret)
    written, attended = rest[: len(cache)], rest[len(cache)]
    return attended, *jax.tree.unflatten(structure, written), split_counters


def _tuning(tiles: int, head_dim: int, dtype: jnp.dtype) -> Tuning:
    """Measured on an H200: two warps read ragged batches 7 % faster than four and even ones 1 % slower; four
    are faster by 7 % where there are so few tiles that the splits, which one of them merges, are many. Codes
    take work to be read: two programs a core hide each other's, which makes long sequences 1.4 times as fast.
    """
    if head_dim > LONG_HEAD:  # of whose few tokens at once nothing is read ahead
        return Tuning(128, 8, 1)
    small = head_dim <= 128 and dtype.itemsize <= 2
    if small and tiles > FEW_TILES:
        return Tuning(256 if dtype == jnp.uint16 else 128, 2, 5)
    return Tuning(128, 4, 5 if small else 3)


def split_count(tiles: int, table_width: int, programs: int, most_splits: int = MAX_SPLITS) -> int:
    """Programs that share a sequence's pages: a power of two that fills the device, at least a page each."""
    most = min(programs // max(tiles, 1), most_splits, table_width)
    return 1 << max(most, 1).bit_length() - 1


def _kernel(
    *refs: Any, cache: Any, options: AttentionOptions, eps: float, offset: float, interpret: bool
) -> None:
    """`cache`: the structure of K and V, whose arrays come behind the counters, as inputs and as outputs."""
    arrays = cache.num_leaves
    slots_ref, table_ref, lens_ref, sinks_ref, *work = refs[1 + arrays : -5 - arrays]
    counters_ref, *written = refs[-5 - arrays : -4]
    o_ref, q_ref, part_ref, lse_ref = refs[-4:]
    k_pages, v_pages = jax.tree.unflatten(cache, written)
    kv_head, split, sequence = (pl.program_id(axis) for axis in range(3))
    pages = split_pages(lens_ref[sequence], k_pages.shape[2], options)
    sync = (lambda: None) if interpret else plt.debug_barrier  # between all threads of a program
    coded = isinstance(k_pages, QuantPages)
    new = HeadTile(HeadRefs(*work), sequence, kv_head, q_ref.dtype, eps, offset, coded)
    # All loads first. The splits of a sequence write the same queries.
    values, slot, rotated = new.values(), slots_ref[sequence], new.rotated()
    plt.store(q_ref.at[sequence, kv_head, new.row, new.column], rotated, mask=new.is_query)
    new.write(rotated, values, k_pages, v_pages, slot, enabled=split == pages.splits - 1)
    sync()
    held = cache_refs((k_pages, v_pages), interpret)
    rows = _HeadRows(q_ref, held.columns)
    state = _attend(q_ref, held, table_ref, pages, rows, options)

    def finish(state: Softmax) -> None:
        if sinks_ref is not None:
            at = sinks_ref.at[kv_head * new.group + rows.number]
            state = add_sink(state, plt.load(at, mask=rows.valid, other=0.0))
        rows.store(o_ref, normalised(state))

    def store_partial() -> None:
        maximum, denominator, _ = state
        lse = maximum + jnp.log2(jnp.maximum(denominator, 1e-30))
        rows.store(part_ref, normalised(state), split)
        plt.store(lse_ref.at[split, *rows.place, rows.number], lse, mask=rows.valid)
        sync()  # all threads have stored before one of them reports it
        before = plt.atomic_add(counters_ref, (sequence, kv_head), jnp.int32(1))

        @pl.when(before == pages.splits - 1)
        def _merge() -> None:
            counters_ref[sequence, kv_head] = jnp.int32(0)  # zero again, as the next layer expects
            finish(_merged(part_ref, lse_ref, pages.splits, rows, held))

    pl.when((split == 0) & (pages.splits == 1))(lambda: finish(state))
    pl.when((split < pages.splits) & (pages.splits > 1))(store_partial)


def _merged(
    part_ref: jax.Ref, lse_ref: jax.Ref, splits: jax.Array, rows: _HeadRows, held: CacheRefs
) -> Softmax:
    """The softmax over what all splits saw: each is like one key, its output the value."""

    def step(split: jax.Array, state: Softmax) -> Softmax:
        maximum, denominator, out = state
        lse = plt.load(lse_ref.at[split, *rows.place, rows.number], mask=rows.valid, other=MASKED)
        parts = jax.tree.unflatten(jax.tree.structure(out), rows.load(part_ref, split))
        new_maximum = jnp.maximum(maximum, lse)
        decay, weight = jnp.exp2(maximum - new_maximum), jnp.exp2(lse - new_maximum)
        added = jax.tree.map(lambda old, part: old * decay[:, None] + part * weight[:, None], out, parts)
        return new_maximum, denominator * decay + weight, added

    return lax.fori_loop(0, splits, step, held.initial(rows.number.size))


class _HeadRows:
    """The tile of this program's query heads: row i is query head i of the KV head, padded to MIN_ROWS. Its
    columns come in blocks.
    """

    def __init__(self, q_ref: jax.Ref, columns: tuple[jax.Array, ...]) -> None:
        group, head_dim = q_ref.shape[2:]
        self.place = pl.program_id(2), pl.program_id(0)
        self.number = jnp.arange(max(MIN_ROWS, pl.next_power_of_2(group)), dtype=jnp.int32)
        self.valid = self.number < group
        self.columns = columns
        self.masks = [self.valid[:, None] & (column < head_dim) for column in columns]

    def load(self, ref: jax.Ref, *first: jax.Array) -> list[jax.Array]:
        """The tile in [*first, T, KH, G, D]."""
        blocks = enumerate(self.masks)
        return [plt.load(ref.at[self._at(i, *first)], mask=mask, other=0) for i, mask in blocks]

    def store(self, ref: jax.Ref, out: Output, *first: jax.Array) -> None:
        """The inverse."""
        for block, values in enumerate(jax.tree.leaves(out)):
            plt.store(ref.at[self._at(block, *first)], values.astype(ref.dtype), mask=self.masks[block])

    def _at(self, block: int, *first: jax.Array) -> tuple[jax.Array, ...]:
        return (*first, *self.place, self.number[:, None], self.columns[block])


@dataclass(frozen=True)
class SplitPages:
    """This program's pages of its sequence, `begin` to `end` - 1; positions it may see; splits that have any.

    A sequence that sees nothing has one split, whose output is zero.
    """

    begin: jax.Array
    end: jax.Array
    oldest: jax.Array
    length: jax.Array
    splits: jax.Array


def split_pages(length: Int32[Array, ""], page_size: int, options: AttentionOptions) -> SplitPages:
    oldest = jnp.int32(0) if options.window is None else jnp.maximum(length - options.window, 0)
    if options.chunk is not None:
        oldest = lax.div(jnp.maximum(length - 1, 0), jnp.int32(options.chunk)) * options.chunk
    first = lax.div(oldest, jnp.int32(page_size))
    end = lax.div(length + page_size - 1, page_size)
    each = jnp.maximum(lax.div(end - first + pl.num_programs(1) - 1, pl.num_programs(1)), 1)
    begin = first + pl.program_id(1) * each
    splits = jnp.maximum(lax.div(end - first + each - 1, each), 1)
    return SplitPages(begin, jnp.minimum(begin + each, end), oldest, length, splits)


def _attend(
    q_ref: jax.Ref,
    held: CacheRefs,
    table_ref: jax.Ref,
    pages: SplitPages,
    rows: _HeadRows,
    options: AttentionOptions,
) -> Softmax:
    """The online softmax of this program's heads over its pages."""
    kv_head, sequence = pl.program_id(0), pl.program_id(2)
    page_size = held.page_size
    q = held.queries(rows.load(q_ref))

    def step(index: jax.Array, state: Softmax) -> Softmax:
        def visible(token: jax.Array) -> jax.Array:
            position = index * page_size + token
            return ((position < pages.length) & (position >= pages.oldest))[None, :]

        page, valid = table_ref[sequence, index], pages.length - index * page_size
        return held.attend(state, q, page, kv_head, valid, visible, options)

    return held.finished(lax.fori_loop(pages.begin, pages.end, step, held.initial(rows.number.size)))
