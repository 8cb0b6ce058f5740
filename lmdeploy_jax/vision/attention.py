"""Attention among patches, both ways, in dense blocks or over a long row of views."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax

from lmdeploy_jax.vision.config import RotaryConfig

DENSE = 1024  # patches up to which all scores are held at once; else as many keys at a time
QUERIES = 4096  # patches beyond which as many queries are attended to at a time
Triple = tuple[Array, Array, Array]
NEVER = -1e30  # finite, so that a row that sees nothing gives a mean and not NaN


def attend(q: Array, k: Array, v: Array, segments: Array | None) -> Array:
    """Softmax attention of q, k, v [B, N, H, D] -> [B, N, H, D].

    segments: int32 [B, N]; a patch sees those of its own segment. None: all of its sequence.
    """
    count = q.shape[1]
    if segments is None or count <= DENSE:
        return _dense(q, k, v, segments)
    return _blocked(q, k, v, segments)


def _dense(q: Array, k: Array, v: Array, segments: Array | None) -> Array:
    scores = _scores(q, k)
    if segments is not None:
        scores = jnp.where(_same(segments, segments), scores, NEVER)
    shares = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return _weighted(shares, v).astype(v.dtype)


def _scores(q: Array, k: Array) -> Array:
    """Scaled products in float32, [B, H, N, M]."""
    exact = precision(q)
    scores = jnp.einsum("bnhd,bmhd->bhnm", q, k, precision=exact, preferred_element_type=jnp.float32)
    return scores * q.shape[-1] ** -0.5


def _weighted(shares: Array, v: Array) -> Array:
    exact = precision(v)
    return jnp.einsum("bhnm,bmhd->bnhd", shares, v, precision=exact, preferred_element_type=jnp.float32)


def precision(x: Array) -> lax.Precision | None:
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
        scores = jnp.where(_same(segments, owners), _scores(q, keys), NEVER)
        new_top = jnp.maximum(top, scores.max(axis=-1))
        shares = jnp.exp(scores - new_top[..., None])
        kept = jnp.exp(top - new_top)
        added = _weighted(shares.astype(values.dtype), values)
        return (new_top, total * kept + shares.sum(axis=-1), out * _by_patch(kept) + added), None

    start = (
        jnp.full((batch, heads, count), NEVER, jnp.float32),
        jnp.zeros((batch, heads, count), jnp.float32),
        jnp.zeros((batch, count, heads, size), jnp.float32),
    )
    (_, total, out), _ = lax.scan(step, start, blocks)
    return (out / _by_patch(total)).astype(blocks[1].dtype)


def _by_patch(x: Array) -> Array:
    """[B, H, N] -> [B, N, H, 1]."""
    return jnp.moveaxis(x, 1, 2)[..., None]


def rotation(config: RotaryConfig, head_dim: int, coordinates: Array) -> tuple[Array, Array]:
    """Cosines and sines f32 [B, N, head_dim / 2], or [B, N, 2, head_dim / 4] of halves, of patches at int32
    [B, N, 2] (row, column).
    """
    quarter = head_dim // 4
    index = jnp.arange(quarter, dtype=jnp.float32)
    if config.kind == "alternating":
        rows, columns = 4 * index / head_dim, (4 * index + 2) / head_dim
    else:
        rows = columns = 2 * index / (head_dim // 2)
    frequencies = config.theta ** -jnp.stack([rows, columns])  # [2, head_dim / 4]
    angles = coordinates[..., None].astype(jnp.float32) * frequencies
    if config.kind == "halves":
        angles = angles[..., ::-1, :]
    else:
        angles = angles.reshape(*coordinates.shape[:-1], 2 * quarter)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Array, turn: tuple[Array, Array]) -> Array:
    """x [B, N, H, D] turned in float32: element i with element i + D / 2, or within each half."""
    cos, sin = (part[:, :, None] for part in turn)
    parts = x.reshape(*x.shape[:3], *cos.shape[3:-1], -1).astype(jnp.float32)
    first, second = jnp.split(parts, 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)
