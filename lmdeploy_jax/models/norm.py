"""Root mean square normalisation (Zhang and Sennrich, 2019)."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from lmdeploy_jax.models.linear import param


class RMSNorm(nnx.Module):
    """Normalises the last axis in float32; with an `offset`, the weight is applied in float32 too (Gemma)."""

    def __init__(
        self, size: int, eps: float, offset: float, *, dtype: jnp.dtype, axis: str | None = None
    ) -> None:
        self.eps = eps
        self.offset = offset
        self.weight = param((size,), dtype, (axis,))

    def __call__(self, x: Array) -> Array:
        wide = x.astype(jnp.float32)
        normed = wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        weight = self.weight[...]
        if self.offset:
            return (normed * (weight.astype(jnp.float32) + self.offset)).astype(x.dtype)
        return normed.astype(x.dtype) * weight
