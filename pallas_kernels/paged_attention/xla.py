"""Decode attention as plain XLA operations."""

from __future__ import annotations

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from lmdeploy_jax.pallas_kernels.options import AttentionOptions
from lmdeploy_jax.pallas_kernels.rope_kv_write import xla
from lmdeploy_jax.pallas_kernels.rope_kv_write.work import HeadWork
from lmdeploy_jax.pallas_kernels.shapes import Pages, Sinks, Slots
from lmdeploy_jax.pallas_kernels.streaming import attend_paged

GROUP = 32  # sequences a loop: faster than fewer, and one long context slows only its own group


def paged_attention(
    parts: Float[Array, "S T KH R D"],
    k_pages: Pages,
    v_pages: Pages,
    slots: Slots,
    page_table: Int32[Array, "T M"],
    kv_lens: Int32[Array, "T"],
    work: HeadWork,
    sinks: Sinks | None,
    options: AttentionOptions,
    *,
    dtype: DTypeLike,
) -> tuple[Float[Array, "T KH R-2 D"], Pages, Pages]:
    """See `lmdeploy_jax.pallas_kernels.paged_attention`."""
    args = (parts, k_pages, v_pages, slots, work)
    q, k_pages, v_pages = xla.rope_kv_write(*args, dtype=dtype)
    positions = jnp.broadcast_to((kv_lens - 1)[:, None], (q.shape[0], q.shape[2]))
    sinks = None if sinks is None else sinks.reshape(q.shape[1:3])
    out = attend_paged(q, k_pages, v_pages, page_table, positions, sinks, options, group=GROUP)
    return out.astype(q.dtype), k_pages, v_pages
