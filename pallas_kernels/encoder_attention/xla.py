"""Encoder attention through XLA: all scores at once, or a block of keys after the other."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from lmdeploy_jax.pallas_kernels.options import MASKED

DENSE = 1024  # patches up to which all scores are held at once; else as many keys at a time
QUERIES = 4096  # patches beyond which as many queries are attended to at a time
Triple = tuple[Array, Array, Array]


def encoder_attention(
    qkv: Float[Array, "B N 3 H D"], segments: Int32[Array, "B N"] | None
) -> Float[Array, "B N H D"]:
    """See `lmdeploy_jax.pallas_kernels.encoder_attention`."""
    q, k, v = (qkv[:, :, part] for part in range(3))
    if segments is None or q.shape[1] <= DENSE:
        return _dense(q, k, v, segments)
    return _blocked(q, k, v, segments)


def _dense(q: Array, k: Array, v: Array, segments: Array | None) -> Array:
    scores = _scores(q, k)
    if segments is not None:
        scores = jnp.where(_same(segments, segments), scores, MASKED)
    shares = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return _weighted(shares, v).astype(v.dtype)


def _scores(q: Array, k: Array) -> Array:
    """Scaled products in float32, [B, H, N, M]."""
    exact = _precision(q)
    scores = jnp.einsum("bnhd,bmhd->bhnm", q, k, precision=exact, preferred_element_type=jnp.float32)
    return scores * q.shape[-1] ** -0.5


def _weighted(shares: Array, v: Array) -> Array:
    exact = _precision(v)
    return jnp.einsum("bhnm,bmhd->bnhd", shares, v, precision=exact, preferred_element_type=jnp.float32)


def _precision(x: Array) -> lax.Precision | None:
    """float32 stays float32 on GPUs, whose default would be TF32."""
    return lax.Precision.HIGHEST if x.dtype == jnp.float32 else None


def _same(rows: Array, columns: Array) -> Array:
    """Whether two patches are of one segment, [B, 1, N, M]."""
    return (rows[:, :, None] == columns[:, None, :])[:, None]


def _blocked(q: Array, k: Array, v: Array, segments: Array) -> Array:
    """The same, a block of queries after the other, so that scores stay small.

    N is a multiple of DENSE, and beyond QUERIES of that.
    """
    keys, (batch, count) = (_blocks(k, DENSE), _blocks(v, DENSE), _blocks(segments, DENSE)), q.shape[:2]
    if count <= QUERIES:
        return _over_keys(q, segments, keys)
    rows = _blocks(q, QUERIES), _blocks(segments, QUERIES)
    parts = lax.map(lambda part: _over_keys(part[0], part[1], keys), rows)
    return jnp.moveaxis(parts, 0, 1).reshape(batch, count, *q.shape[2:])


def _blocks(x: Array, size: int) -> Array:
    """[B, N, ...] -> [N / size, B, size, ...]."""
    return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)


def _over_keys(q: Array, segments: Array, blocks: Triple) -> Array:
    """Attention of some queries, a block of keys after the other with a running maximum.

    blocks: keys, values and segments, as `_blocks` cuts them.
    """
    batch, count, heads, size = q.shape

    def step(carry: Triple, block: Triple) -> tuple[Triple, None]:
        top, total, out = carry
        keys, values, owners = block
        scores = jnp.where(_same(segments, owners), _scores(q, keys), MASKED)
        new_top = jnp.maximum(top, scores.max(axis=-1))
        shares = jnp.exp(scores - new_top[..., None])
        kept = jnp.exp(top - new_top)
        added = _weighted(shares.astype(values.dtype), values)
        return (new_top, total * kept + shares.sum(axis=-1), out * _by_patch(kept) + added), None

    start = (
        jnp.full((batch, heads, count), MASKED, jnp.float32),
        jnp.zeros((batch, heads, count), jnp.float32),
        jnp.zeros((batch, count, heads, size), jnp.float32),
    )
    (_, total, out), _ = lax.scan(step, start, blocks)
    return (out / _by_patch(total)).astype(blocks[1].dtype)


def _by_patch(x: Array) -> Array:
    """[B, H, N] -> [B, N, H, 1]."""
    return jnp.moveaxis(x, 1, 2)[..., None]
