"""RMSNorm as plain XLA operations."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def rms_norm(
    x: Float[Array, "*rows E"], weight: Float[Array, "E"], *, eps: float, offset: float = 0.0
) -> Float[Array, "*rows E"]:
    """Normalises the last axis in float32; with an `offset`, the weight is applied in float32 too (Gemma)."""
    wide = x.astype(jnp.float32)
    normed = wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    if offset:
        return (normed * (weight.astype(jnp.float32) + offset)).astype(x.dtype)
    return normed.astype(x.dtype) * weight


def add_rms_norm(
    x: Float[Array, "T E"],
    delta: Float[Array, "*S T E"],
    weight: Float[Array, "E"],
    *,
    eps: float,
    offset: float,
) -> tuple[Float[Array, "T E"], Float[Array, "T E"]]:
    """See `lmdeploy_jax.pallas_kernels.norm`."""
    delta = jnp.sum(delta, axis=0) if delta.ndim == 3 else delta
    x = (x.astype(jnp.float32) + delta.astype(jnp.float32)).astype(x.dtype)
    return x, rms_norm(x, weight, eps=eps, offset=offset)
