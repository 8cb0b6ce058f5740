"""Decode attention in Pallas (Triton backend): split-KV, one program a (KV head, split, sequence).

Flash-decoding (Dao et al., 2023): each split runs an online softmax over its share of a sequence's own pages,
and a second kernel merges the splits by their log-sum-exp. A tile's rows are the query heads of one KV head.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.blocks import LOG2E, add_sink, attend_page, initial_state, load_page, normalised
from pallas_kernels.launch import Launch, launch
from pallas_kernels.options import MASKED, AttentionOptions

MIN_ROWS = 16  # rows of the smallest tensor-core product
MAX_SPLITS = 32


@dataclass(frozen=True)
class Tuning:
    """How the work is cut and run: programs to aim at, Triton's warps and pipeline stages."""

    programs: int  # about two waves of four on each of an H200's 132 multiprocessors
    num_warps: int
    num_stages: int


def paged_attention(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    page_table: jax.Array,
    kv_lens: jax.Array,
    sinks: jax.Array | None,
    options: AttentionOptions,
    *,
    tuning: Tuning | None = None,
    interpret: bool,
) -> jax.Array:
    """See `pallas_kernels.paged_attention.paged_attention`."""
    sequences, heads, head_dim = q.shape
    kv_heads = k_pages.shape[1]
    tuning = tuning or _tuning(head_dim, k_pages.dtype)
    splits = split_count(sequences * kv_heads, page_table.shape[1], tuning.programs)
    grid = (kv_heads, splits, sequences)
    how = Launch("paged_attention", grid, tuning.num_warps, tuning.num_stages)
    run = functools.partial(launch, interpret=interpret)
    arrays = (q, k_pages, v_pages, page_table, kv_lens)
    if splits == 1:
        kernel = functools.partial(_whole_kernel, options=options)
        return run(kernel, how, jax.ShapeDtypeStruct(q.shape, q.dtype), *arrays, sinks)
    partials = [
        jax.ShapeDtypeStruct((splits, sequences, heads, head_dim), jnp.float32),
        jax.ShapeDtypeStruct((splits, sequences, heads), jnp.float32),
    ]
    out, lse = run(functools.partial(_split_kernel, options=options), how, partials, *arrays)
    merge = Launch("paged_attention_merge", (heads, sequences), num_warps=2, num_stages=1)
    return run(_merge_kernel, merge, jax.ShapeDtypeStruct(q.shape, q.dtype), out, lse, sinks)


def _tuning(head_dim: int, dtype: jnp.dtype) -> Tuning:
    """Measured on an H200: the narrow, deep one reads ragged batches 7 % faster and even ones 1 % slower."""
    small = head_dim <= 128 and dtype.itemsize <= 2
    return Tuning(1024, 2, 5) if small else Tuning(1024, 4, 3)


def split_count(tiles: int, table_width: int, programs: int) -> int:
    """Programs that share a sequence's pages: a power of two that fills the device, at least a page each."""
    wanted = min(programs // max(tiles, 1), MAX_SPLITS, table_width)
    return 1 << max(wanted, 1).bit_length() - 1


def _whole_kernel(
    q_ref: jax.Ref,
    k_ref: jax.Ref,
    v_ref: jax.Ref,
    table_ref: jax.Ref,
    lens_ref: jax.Ref,
    sinks_ref: jax.Ref | None,
    o_ref: jax.Ref,
    *,
    options: AttentionOptions,
) -> None:
    sequence = pl.program_id(2)
    rows = _HeadRows(q_ref, k_ref)
    state = _attend(q_ref, k_ref, v_ref, table_ref, lens_ref, rows, options)
    if sinks_ref is not None:
        state = add_sink(state, plt.load(sinks_ref.at[rows.head], mask=rows.valid, other=0.0))
    out = normalised(state).astype(o_ref.dtype)
    plt.store(o_ref.at[sequence, rows.head[:, None], rows.column], out, mask=rows.mask)


def _split_kernel(
    q_ref: jax.Ref,
    k_ref: jax.Ref,
    v_ref: jax.Ref,
    table_ref: jax.Ref,
    lens_ref: jax.Ref,
    o_ref: jax.Ref,
    lse_ref: jax.Ref,
    *,
    options: AttentionOptions,
) -> None:
    split, sequence = pl.program_id(1), pl.program_id(2)
    rows = _HeadRows(q_ref, k_ref)
    state = _attend(q_ref, k_ref, v_ref, table_ref, lens_ref, rows, options)
    maximum, denominator, _ = state
    lse = jnp.where(denominator > 0, maximum + jnp.log2(jnp.maximum(denominator, 1e-30)), MASKED)
    plt.store(o_ref.at[split, sequence, rows.head[:, None], rows.column], normalised(state), mask=rows.mask)
    plt.store(lse_ref.at[split, sequence, rows.head], lse, mask=rows.valid)


class _HeadRows:
    """The tile of this program's query heads: row i is query head i of the KV head, padded to MIN_ROWS."""

    def __init__(self, q_ref: jax.Ref, k_ref: jax.Ref) -> None:
        heads, head_dim = q_ref.shape[1:]
        group = heads // k_ref.shape[1]
        row = jnp.arange(max(MIN_ROWS, pl.next_power_of_2(group)), dtype=jnp.int32)
        self.head = pl.program_id(0) * group + row
        self.valid = row < group
        self.column = jnp.arange(pl.next_power_of_2(head_dim), dtype=jnp.int32)[None, :]
        self.mask = self.valid[:, None] & (self.column < head_dim)


def _attend(
    q_ref: jax.Ref,
    k_ref: jax.Ref,
    v_ref: jax.Ref,
    table_ref: jax.Ref,
    lens_ref: jax.Ref,
    rows: _HeadRows,
    options: AttentionOptions,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The online softmax of this program's heads over its split of the sequence's visible pages."""
    kv_head, split, sequence = (pl.program_id(axis) for axis in range(3))
    page_size = k_ref.shape[2]
    length = lens_ref[sequence]
    oldest = 0 if options.window is None else jnp.maximum(length - options.window, 0)
    first = lax.div(jnp.int32(oldest), jnp.int32(page_size))
    end = lax.div(length + page_size - 1, page_size)
    share = lax.div(end - first + pl.num_programs(1) - 1, pl.num_programs(1))
    begin = first + split * share
    q = plt.load(q_ref.at[sequence, rows.head[:, None], rows.column], mask=rows.mask, other=0)
    q = q.astype(k_ref.dtype)

    def step(index: jax.Array, state: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
        page = table_ref[sequence, index]
        keys = load_page(k_ref, page, kv_head)
        values = load_page(v_ref, page, kv_head, length - index * page_size)
        position = index * page_size + jnp.arange(page_size, dtype=jnp.int32)
        visible = (position < length) & (position >= oldest)
        return attend_page(state, q, keys, values, visible[None, :], options)

    return lax.fori_loop(begin, jnp.minimum(begin + share, end), step, initial_state(*rows.mask.shape))


def _merge_kernel(o_ref: jax.Ref, lse_ref: jax.Ref, sinks_ref: jax.Ref | None, out_ref: jax.Ref) -> None:
    head, sequence = pl.program_id(0), pl.program_id(1)
    splits, _, _, head_dim = o_ref.shape
    split = jnp.arange(splits, dtype=jnp.int32)
    column = jnp.arange(pl.next_power_of_2(head_dim), dtype=jnp.int32)
    lse = lse_ref[:, sequence, head]
    maximum = jnp.max(lse, axis=0)
    if sinks_ref is not None:
        maximum = jnp.maximum(maximum, sinks_ref[head] * LOG2E)
    weights = jnp.where(lse > MASKED, jnp.exp2(lse - maximum), 0.0)
    denominator = jnp.sum(weights, axis=0)
    if sinks_ref is not None:
        denominator += jnp.exp2(sinks_ref[head] * LOG2E - maximum)
    mask = jnp.broadcast_to((column < head_dim)[None, :], (splits, column.size))
    parts = plt.load(o_ref.at[split[:, None], sequence, head, column[None, :]], mask=mask, other=0.0)
    out = jnp.sum(parts * weights[:, None], axis=0) / jnp.maximum(denominator, 1e-30)
    plt.store(out_ref.at[sequence, head, column], out.astype(out_ref.dtype), mask=column < head_dim)
