"""Latent attention as plain XLA operations: attention with one KV head, whose keys are its values too."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from lmdeploy_jax.pallas_kernels.options import AttentionOptions
from lmdeploy_jax.pallas_kernels.prefill_attention.xla import prefill_attention
from lmdeploy_jax.pallas_kernels.shapes import PlainPages, Slots, Tiles
from lmdeploy_jax.pallas_kernels.streaming import attend_paged

GROUP = 32  # sequences a loop


def write(pages: PlainPages, latents: Float[Array, "T D"], slots: Slots) -> PlainPages:
    """The latents into their slots; what has a negative one goes to page 0."""
    page, offset = jnp.divmod(jnp.maximum(slots, 0), pages.shape[2])
    return pages.at[page, 0, offset].set(latents.astype(pages.dtype))


def decode(
    q: Float[Array, "T H D"],
    pages: PlainPages,
    page_table: Int32[Array, "T M"],
    kv_lens: Int32[Array, "T"],
    options: AttentionOptions,
) -> Float[Array, "T H D"]:
    """One token a sequence."""
    positions = jnp.broadcast_to((kv_lens - 1)[:, None], q.shape[:2])
    out = attend_paged(q[:, None], pages, pages, page_table, positions, None, options, group=GROUP)
    return out[:, 0].astype(q.dtype)


def prefill(
    q: Float[Array, "T H D"],
    pages: PlainPages,
    page_table: Int32[Array, "S M"],
    tiles: Tiles,
    options: AttentionOptions,
    rows: int,
) -> Float[Array, "T H D"]:
    """Packed chunks, whose latents the cache already holds."""
    return prefill_attention(q, pages, pages, page_table, tiles, None, options, rows)
