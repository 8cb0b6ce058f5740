"""Decode attention as plain XLA operations."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.options import AttentionOptions
from pallas_kernels.streaming import attend_paged

GROUP = 32  # sequences a loop: faster than fewer, and one long context slows only its own group


def paged_attention(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    page_table: jax.Array,
    kv_lens: jax.Array,
    sinks: jax.Array | None,
    options: AttentionOptions,
) -> jax.Array:
    """See `pallas_kernels.paged_attention.paged_attention`."""
    rows, heads, head_dim = q.shape
    kv_heads = k_pages.shape[1]
    folded = (kv_heads, heads // kv_heads)
    positions = jnp.broadcast_to((kv_lens - 1)[:, None], (rows, folded[1]))
    out = attend_paged(
        q.reshape(rows, *folded, head_dim),
        k_pages,
        v_pages,
        page_table,
        positions,
        None if sinks is None else sinks.reshape(folded),
        options,
        group=GROUP,
    )
    return out.reshape(q.shape).astype(q.dtype)
