"""Prefill attention: ragged chunks of queries, packed, against their sequences' pages of the KV cache."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from lmdeploy_jax.pallas_kernels.options import AttentionOptions, check_cache, check_heads
from lmdeploy_jax.pallas_kernels.prefill_attention import xla
from lmdeploy_jax.pallas_kernels.prefill_attention.tiles import (
    TILE_ROWS,
    build_tiles,
    max_tiles,
    scratch_pages,
    tile_rows,
)
from lmdeploy_jax.pallas_kernels.quant_pages import QuantPages
from lmdeploy_jax.pallas_kernels.registry import check_backend
from lmdeploy_jax.pallas_kernels.shapes import Pages, Sinks, Tiles

__all__ = ["build_tiles", "max_tiles", "prefill_attention", "scratch_pages", "tile_rows", "why_not_mosaic"]


def why_not_mosaic(dtype: DTypeLike, cache_dtype: DTypeLike, head_dim: int) -> str | None:
    """Why backend "mosaic" cannot do it, or None. It knows no sinks, lookahead, window, chunk or soft cap
    either. Pages of codes are widened to `dtype`, and count as such.
    """
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16) or jnp.dtype(cache_dtype) != jnp.dtype(dtype):
        return f"it multiplies 16-bit numbers, not {dtype} with {cache_dtype}"
    if head_dim not in (64, 128):
        return f"head_dim {head_dim} is neither 64 nor 128"
    return None


def prefill_attention(
    q: Float[Array, "T H D"],
    k_pages: Pages,
    v_pages: Pages,
    page_table: Int32[Array, "S M"],
    tiles: Tiles,
    *,
    options: AttentionOptions,
    sinks: Sinks | None = None,
    lookahead: Int32[Array, "T"] | None = None,
    backend: str,
    tile_rows: int | None = None,
) -> Float[Array, "T H D"]:
    """Causal attention of packed query rows over pages that already hold their keys and values.

    q [T, H, D]; k_pages, v_pages [pages, KH, PAGE_SIZE, D]; page_table int32 [S, M], padded with 0; tiles
    int32 [W, 4] from `build_tiles` with this backend's `tile_rows`; "xla" also takes those of another one,
    whose `tile_rows` it is told. A row at position p sees keys at positions p-window < j <= p + `lookahead`,
    int32 [T], None being 0: those must be in the pages too; with chunks, those of its own. `sinks` f32 [H]
    adds a logit to each head's softmax denominator. Softmax in f32. Backend "mosaic" is for Hopper, see
    `why_not_mosaic`. Returns [T, H, D] in q's dtype; rows that no tile covers hold anything finite, as q
    does. Raises ValueError for shapes or options that do not fit.
    """
    check_backend(backend, "mosaic")
    check_cache(k_pages, v_pages)
    check_heads(q, k_pages, sinks)
    if tiles.ndim != 2 or tiles.shape[1] != 4:
        raise ValueError(f"tiles has shape {tiles.shape}; it must be [tiles, 4], as build_tiles makes it")
    if backend == "xla":
        rows = tile_rows or TILE_ROWS["xla"]
        return xla.prefill_attention(q, k_pages, v_pages, page_table, tiles, sinks, options, rows, lookahead)
    from lmdeploy_jax.pallas_kernels.prefill_attention import pallas  # CPUs never need it

    arrays = (q, k_pages, v_pages, page_table, tiles, sinks, lookahead)
    if backend != "mosaic":
        return pallas.prefill_attention(*arrays, options, interpret=backend == "pallas_interpret")
    cache: tuple[Any, Any] = k_pages, v_pages
    coded = isinstance(k_pages, QuantPages)
    reason = why_not_mosaic(q.dtype, q.dtype if coded else k_pages.dtype, q.shape[2])
    if any(x is not None for x in (sinks, lookahead, options.window, options.chunk, options.soft_cap)):
        reason = "it knows no sinks, lookahead, window, chunk or soft cap"
    if reason:
        raise ValueError(f"backend 'mosaic' cannot do this prefill attention: {reason}; take 'pallas'")
    from lmdeploy_jax.pallas_kernels.prefill_attention import mosaic, widened

    if coded:
        return widened.prefill_attention(q, *cache, page_table, tiles, options)
    some = pallas.prefill_attention(*arrays, options, only_short=True, interpret=False)
    return mosaic.prefill_attention(some, *cache, page_table, tiles, options)
