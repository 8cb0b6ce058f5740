"""What some families do to q, k and v between their product and the cache that the kernels do not do.

It runs in XLA, and hands the kernels q, k and v as they are to be, with as little work as is left.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike
from jaxtyping import Float, Float32

from lmdeploy_jax.models.config import AttentionConfig
from lmdeploy_jax.models.norm import WidthNorm
from lmdeploy_jax.models.rope import Rotation
from lmdeploy_jax.pallas_kernels.norm import rms_norm
from lmdeploy_jax.pallas_kernels.rope_kv_write import HeadWork
from lmdeploy_jax.pallas_kernels.rope_kv_write.xla import rotate

Reduce = Callable[[Array, DTypeLike], Array]


def biased(
    qkv: Float[Array, "*S T KH R D"], work: HeadWork, dtype: DTypeLike
) -> tuple[Float[Array, "T KH R D"], HeadWork]:
    """The sum of the parts with the bias, and the work without it."""
    whole = (qkv.sum(0) if qkv.ndim == 5 else qkv).astype(dtype)
    return whole if work.bias is None else whole + work.bias, replace(work, bias=None)


def without_gates(
    qkv: Float[Array, "*S T KH R D"], work: HeadWork, dtype: DTypeLike
) -> tuple[Float[Array, "T KH N D"], Float[Array, "T KH G D"], HeadWork]:
    """The gates that stand behind the query heads, and qkv without them, biases added."""
    qkv, work = biased(qkv, work, dtype)
    queries, gates = qkv[:, :, :-2:2], qkv[:, :, 1:-2:2]
    return jnp.concatenate([queries, qkv[:, :, -2:]], axis=2), gates, work


def norm_widths(
    qkv: Float[Array, "T KH R D"], norms: tuple[WidthNorm, WidthNorm], config: AttentionConfig, *,
    eps: float, replicas: int, reduce: Reduce
) -> Float[Array, "T KH R D"]:  # fmt: skip
    """RMSNorm over all heads of q, and over all of k, on whatever devices they are. Each KV head is there
    `replicas` times.
    """
    q, k = qkv[:, :, :-2].astype(jnp.float32), qkv[:, :, -2].astype(jnp.float32)
    sums = jnp.stack([jnp.square(q).sum((1, 2, 3)), jnp.square(k).sum((1, 2)) / replicas], axis=1)
    totals = reduce(sums, jnp.float32)  # [T, 2]
    sizes = jnp.array([config.heads * config.head_dim, config.kv_heads * config.head_dim], jnp.float32)
    scale = lax.rsqrt(totals / sizes + eps)
    q = (q * scale[:, 0, None, None, None]).astype(qkv.dtype) * norms[0].weight[...]
    k = (k * scale[:, 1, None, None]).astype(qkv.dtype) * norms[1].weight[...]
    return jnp.concatenate([q, k[:, :, None], qkv[:, :, -1:]], axis=2)


def norm_heads(
    qkv: Float[Array, "T KH R D"], norms: tuple[WidthNorm, WidthNorm], eps: float
) -> Float[Array, "T KH R D"]:
    """LayerNorm over each head of q and of k, with weights of its own."""
    q = _layer_norm(qkv[:, :, :-2], norms[0].weight[...], eps)
    k = _layer_norm(qkv[:, :, -2], norms[1].weight[...], eps)
    return jnp.concatenate([q, k[:, :, None], qkv[:, :, -1:]], axis=2)


def _layer_norm(x: Float[Array, "T *heads D"], weight: Float[Array, "*heads D"], eps: float) -> Array:
    """The weights are those of pairs of neighbours, the elements here of pairs of halves."""
    halves = weight.reshape(*weight.shape[:-1], -1, 2).swapaxes(-1, -2).reshape(weight.shape)
    wide = x.astype(jnp.float32)
    centred = wide - wide.mean(-1, keepdims=True)
    normed = centred * lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + eps)
    return (normed * halves.astype(jnp.float32)).astype(x.dtype)


def queries_alone(
    qkv: Float[Array, "*S T KH G D"], work: HeadWork
) -> tuple[Float[Array, "*S T KH R D"], HeadWork]:
    """With zeros in the places of k and v, which a layer that reads another's does not have."""

    def padded(x: Array) -> Array:
        return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, 2), (0, 0)])

    bias = None if work.bias is None else padded(work.bias)
    return padded(qkv), replace(work, bias=bias, k_norm=work.q_norm)


def norm_values(qkv: Float[Array, "T KH R D"], eps: float) -> Float[Array, "T KH R D"]:
    """RMSNorm without weight over each head of v."""
    ones = jnp.ones(qkv.shape[-1:], qkv.dtype)
    v = rms_norm(qkv[:, :, -1:], ones, eps=eps, offset=0.0)
    return jnp.concatenate([qkv[:, :, :-1], v], axis=2)


def rotate_then_norm(
    qkv: Float[Array, "T KH R D"], work: HeadWork
) -> tuple[Float[Array, "T KH R D"], HeadWork]:
    """q and k rotated and normed, in that order."""
    assert work.q_norm is not None  # as configured
    assert work.k_norm is not None
    q, k = qkv[:, :, :-2], qkv[:, :, -2:-1]
    if work.cos is not None and work.sin is not None:
        q, k = (rotate(x, work.cos, work.sin) for x in (q, k))
    how = {"eps": work.eps, "offset": work.offset}
    q, k = rms_norm(q, work.q_norm, **how), rms_norm(k, work.k_norm, **how)
    done = replace(work, q_norm=None, k_norm=None, cos=None, sin=None)
    return jnp.concatenate([q, k, qkv[:, :, -1:]], axis=2), done


def scale_queries(qkv: Float[Array, "T KH R D"], rope: Rotation | None) -> Float[Array, "T KH R D"]:
    """q times the factor of its position, which rotation lets pass."""
    factor: Float32[Array, "T"] | None = None if rope is None else rope.query_factor
    if factor is None:
        return qkv
    q = (qkv[:, :, :-2].astype(jnp.float32) * factor[:, None, None, None]).astype(qkv.dtype)
    return jnp.concatenate([q, qkv[:, :, -2:]], axis=2)
