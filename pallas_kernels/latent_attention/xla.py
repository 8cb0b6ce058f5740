"""Latent attention as plain XLA operations: attention with one KV head, whose keys are its values too."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from lmdeploy_jax.pallas_kernels.norm import rms_norm
from lmdeploy_jax.pallas_kernels.options import AttentionOptions
from lmdeploy_jax.pallas_kernels.prefill_attention.xla import prefill_attention
from lmdeploy_jax.pallas_kernels.rope_kv_write.work import HeadWork
from lmdeploy_jax.pallas_kernels.rope_kv_write.xla import rotate
from lmdeploy_jax.pallas_kernels.shapes import PlainPages, Slots, Tiles
from lmdeploy_jax.pallas_kernels.streaming import attend_paged

GROUP = 32  # sequences a loop


def queries(
    q: Float[Array, "T H D"], latents: Float[Array, "T L"], kv_b: Float[Array, "H N R"], work: HeadWork
) -> tuple[Float[Array, "T H L"], Float[Array, "T L"]]:
    """See `latent_queries`."""
    assert work.k_norm is not None
    rank = work.k_norm.size
    nope = q.shape[2] - (latents.shape[1] - rank)

    def turned(x: jax.Array) -> jax.Array:
        return x if work.cos is None or work.sin is None else rotate(x, work.cos, work.sin)

    led = _by_head("thp,hpr->thr", q[..., :nope], kv_b[:, :nope])
    normed = rms_norm(latents[:, :rank], work.k_norm, eps=work.eps)
    queries = jnp.concatenate([led, turned(q[..., nope:])], axis=-1)
    return queries, jnp.concatenate([normed, turned(latents[:, rank:])], axis=-1)


def values_of_latents(
    out: Float[Array, "T H R"], kv_b: Float[Array, "H N R"], value_dim: int
) -> Float[Array, "T H V"]:
    """What attention's outputs in the space of the latents stand for, by the last rows of kv_b."""
    return _by_head("thr,hvr->thv", out, kv_b[:, kv_b.shape[1] - value_dim :])


def _by_head(equation: str, x: jax.Array, weight: jax.Array) -> jax.Array:
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.einsum(equation, x, weight, precision=precision)


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
