"""Prompts over a quantised cache through Mosaic, whose products take 16-bit numbers alone.

Pages of codes that long tiles see are widened to scratch first, one after another: reading and writing them
takes a fiftieth of the time that 8,192 tokens attend. Scratch has room for the contexts of almost any step;
tiles of a sequence that finds none left, and short ones, read the codes through Triton.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from lmdeploy_jax.pallas_kernels.cache_refs import QuantRefs
from lmdeploy_jax.pallas_kernels.launch import Launch, launch
from lmdeploy_jax.pallas_kernels.options import PAGE_SIZE, AttentionOptions
from lmdeploy_jax.pallas_kernels.prefill_attention import mosaic, pallas
from lmdeploy_jax.pallas_kernels.prefill_attention.tiles import SHORT, scratch_pages
from lmdeploy_jax.pallas_kernels.quant_pages import QuantPages
from lmdeploy_jax.pallas_kernels.shapes import PlainPages, Tiles


class Plan(NamedTuple):
    """Which pages are widened and who reads them.

    sources: the page of the cache that each page of scratch is made from, -1 for none. page_table: that of
    scratch. widened, others: the tiles, with zeros in place of those that read the other kind.
    """

    sources: Int32[Array, "pages"]
    page_table: Int32[Array, "S M"]
    widened: Tiles
    others: Tiles


def prefill_attention(
    q: Float[Array, "T H D"],
    k_pages: QuantPages,
    v_pages: QuantPages,
    page_table: Int32[Array, "S M"],
    tiles: Tiles,
    options: AttentionOptions,
) -> Float[Array, "T H D"]:
    """See `lmdeploy_jax.pallas_kernels.prefill_attention`."""
    plan = plan_scratch(page_table, tiles, scratch_pages(q.shape[0], page_table.shape[1]))
    some = pallas.prefill_attention(
        q, k_pages, v_pages, page_table, plan.others, None, None, options, few_long=True, interpret=False
    )
    widened = widen(k_pages, v_pages, plan.sources, q.dtype, interpret=False)
    live = jnp.max(jnp.where(plan.widened[:, 2] > 0, jnp.arange(tiles.shape[0], dtype=jnp.int32) + 1, 0))
    return mosaic.prefill_attention(some, *widened, plan.page_table, plan.widened, options, live=live)


def plan_scratch(page_table: Int32[Array, "S M"], tiles: Tiles, room: int) -> Plan:
    """Sequences get pages of scratch in the order of their rows, as long as there are any.

    Every entry of a row names a page that holds the row's, beyond its last one too, since blocks of keys are
    two pages: what scratch was never given may be no number.
    """
    sequences, width = page_table.shape
    row, entry = jnp.arange(sequences, dtype=jnp.int32), jnp.arange(width, dtype=jnp.int32)
    long = tiles[:, 2] > SHORT
    seen = jnp.where(long, (tiles[:, 2] + tiles[:, 3] + PAGE_SIZE - 1) // PAGE_SIZE, 0)
    counts = jnp.max(jnp.where(tiles[:, 0] == row[:, None], seen, 0), axis=1)
    ends = jnp.sum(jnp.where(row <= row[:, None], counts, 0), axis=1, dtype=jnp.int32)
    begins = ends - counts
    table = begins[:, None] + jnp.minimum(entry, jnp.maximum(counts - 1, 0)[:, None])
    number = jnp.arange(room, dtype=jnp.int32)
    owner = jnp.sum(ends <= number[:, None], axis=1, dtype=jnp.int32)
    of_owner = jnp.minimum(owner, sequences - 1)
    sources = page_table[of_owner, jnp.clip(number - begins[of_owner], 0, width - 1)]
    fits = long & (ends <= room)[tiles[:, 0]]
    widened, others = (jnp.where(mine[:, None], tiles, 0) for mine in (fits, ~fits))
    return Plan(jnp.where(owner < sequences, sources, -1), jnp.minimum(table, room - 1), widened, others)


def widen(
    k_pages: QuantPages,
    v_pages: QuantPages,
    sources: Int32[Array, "pages"],
    dtype: DTypeLike,
    *,
    interpret: bool,
) -> tuple[PlainPages, PlainPages]:
    """The pages as `dtype` has their numbers."""
    cache, structure = jax.tree.flatten((k_pages, v_pages))
    shape = (sources.shape[0], *k_pages.shape[1:])
    how = Launch("widen_pages", shape[:2], num_warps=4, num_stages=1)
    kernel = functools.partial(_widen, cache=structure, interpret=interpret)
    out = [jax.ShapeDtypeStruct(shape, dtype)] * 2
    k_wide, v_wide = launch(kernel, how, out, sources, *cache, interpret=interpret)
    return k_wide, v_wide


def _widen(sources_ref: jax.Ref, *refs: Any, cache: Any, interpret: bool) -> None:
    """A program a page and KV head."""
    number, head = pl.program_id(0), pl.program_id(1)
    k_pages, v_pages = jax.tree.unflatten(cache, refs[:-2])
    held = QuantRefs(k_pages, v_pages, interpret)
    page = sources_ref[number]

    @pl.when(page >= 0)
    def _write() -> None:
        token = jnp.arange(held.page_size, dtype=jnp.int32)[:, None]
        for pages, out_ref in zip((held.k, held.v), refs[-2:], strict=True):
            for column, block in zip(held.columns, held.widened(pages, page, head), strict=True):
                plt.store(out_ref.at[number, head, token, column], block.astype(out_ref.dtype))
