"""Root mean square normalisation (Zhang and Sennrich, 2019)."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float

from lmdeploy_jax.models.linear import param
from lmdeploy_jax.pallas_kernels.norm import rms_norm


class RMSNorm(nnx.Module):
    """Normalises the last axis in float32; with an `offset`, the weight is applied in float32 too (Gemma)."""

    def __init__(
        self, size: int, eps: float, offset: float, *, dtype: jnp.dtype, axis: str | None = None
    ) -> None:
        self.eps = eps
        self.offset = offset
        self.weight = param((size,), dtype, (axis,))

    def __call__(self, x: Float[Array, "*rows E"]) -> Float[Array, "*rows E"]:
        return rms_norm(x, self.weight[...], eps=self.eps, offset=self.offset)
