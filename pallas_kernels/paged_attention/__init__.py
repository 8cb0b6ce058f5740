"""Decode attention: one query a sequence against its pages of the KV cache."""

from __future__ import annotations

import jax

from pallas_kernels.options import AttentionOptions, check_cache, check_heads
from pallas_kernels.paged_attention import xla
from pallas_kernels.registry import check_backend


def paged_attention(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    page_table: jax.Array,
    kv_lens: jax.Array,
    arrivals: jax.Array,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: jax.Array | None = None,
    backend: str,
) -> tuple[jax.Array, jax.Array]:
    """Attention of one new token a sequence over its cached keys, its own among them.

    q [S, H, D]; k_pages, v_pages [pages, KH, PAGE_SIZE, D]; page_table int32 [S, M], padded with 0; kv_lens
    int32 [S], tokens in the cache with the new one (0: a row that pads the batch; it comes out as zeros).
    `window` limits the query at position L-1 to keys at positions above L-1-window; `sinks` f32 [H] adds a
    logit to each head's softmax denominator (gpt-oss). Softmax in f32. arrivals int32 [S, KH] are counters
    that are zero between calls and in place where the caller lets go of them: one array serves all layers.
    Returns [S, H, D] in q's dtype, and the counters. Raises ValueError for shapes or options that do not fit.
    """
    check_backend(backend)
    check_cache(k_pages, v_pages)
    check_heads(q, k_pages, sinks)
    if arrivals.shape != (q.shape[0], k_pages.shape[1]):
        raise ValueError(f"arrivals has shape {arrivals.shape}; it must be {(q.shape[0], k_pages.shape[1])}")
    options = AttentionOptions(scale, window, soft_cap)
    if backend == "xla":
        return xla.paged_attention(q, k_pages, v_pages, page_table, kv_lens, sinks, options), arrivals
    from pallas_kernels.paged_attention import pallas  # a CPU does without the import's time

    arrays = (q, k_pages, v_pages, page_table, kv_lens, arrivals, sinks)
    return pallas.paged_attention(*arrays, options, interpret=backend == "pallas_interpret")
