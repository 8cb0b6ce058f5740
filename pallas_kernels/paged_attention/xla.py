"""Decode attention as plain XLA operations."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lmdeploy_jax.pallas_kernels.options import AttentionOptions
from lmdeploy_jax.pallas_kernels.rope_kv_write import xla
from lmdeploy_jax.pallas_kernels.rope_kv_write.work import HeadWork
from lmdeploy_jax.pallas_kernels.streaming import attend_paged

GROUP = 32  # sequences a loop: faster than fewer, and one long context slows only its own group


def paged_attention(
    parts: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    slots: jax.Array,
    page_table: jax.Array,
    kv_lens: jax.Array,
    work: HeadWork,
    sinks: jax.Array | None,
    options: AttentionOptions,
    *,
    eps: float,
    offset: float,
    dtype: DTypeLike,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `lmdeploy_jax.pallas_kernels.paged_attention`; parts [S, T, KH, G + 2, D]."""
    args = (parts, k_pages, v_pages, slots, work)
    q, k_pages, v_pages = xla.rope_kv_write(*args, eps=eps, offset=offset, dtype=dtype)
    positions = jnp.broadcast_to((kv_lens - 1)[:, None], (q.shape[0], q.shape[2]))
    sinks = None if sinks is None else sinks.reshape(q.shape[1:3])
    out = attend_paged(q, k_pages, v_pages, page_table, positions, sinks, options, group=GROUP)
    return out.astype(q.dtype), k_pages, v_pages
