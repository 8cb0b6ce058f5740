"""RMSNorm as plain XLA operations."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax


def rms_norm(x: jax.Array, weight: jax.Array, *, eps: float, offset: float = 0.0) -> jax.Array:
    """Normalises the last axis in float32; with an `offset`, the weight is applied in float32 too (Gemma)."""
    wide = x.astype(jnp.float32)
    normed = wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    if offset:
        return (normed * (weight.astype(jnp.float32) + offset)).astype(x.dtype)
    return normed.astype(x.dtype) * weight


def add_rms_norm(
    x: jax.Array, delta: jax.Array, weight: jax.Array, *, eps: float, offset: float
) -> tuple[jax.Array, jax.Array]:
    """See `lmdeploy_jax.pallas_kernels.norm`."""
    delta = jnp.sum(delta, axis=0) if delta.ndim == 3 else delta
    x = (x.astype(jnp.float32) + delta.astype(jnp.float32)).astype(x.dtype)
    return x, rms_norm(x, weight, eps=eps, offset=offset)
