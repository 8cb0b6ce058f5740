"""Norms: RMSNorm (Zhang and Sennrich, 2019) and LayerNorm (Ba et al., 2016)."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
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


class LayerNorm(nnx.Module):
    """Normalises the last axis in float32: mean 0 and variance 1, then the weight, then perhaps a bias."""

    def __init__(
        self, size: int, eps: float, *, bias: bool, dtype: jnp.dtype, axis: str | None = None
    ) -> None:
        self.eps = eps
        self.weight = param((size,), dtype, (axis,))
        self.bias = param((size,), dtype, (axis,)) if bias else None

    def __call__(self, x: Float[Array, "*rows E"]) -> Float[Array, "*rows E"]:
        wide = x.astype(jnp.float32)
        centred = wide - wide.mean(-1, keepdims=True)
        normed = centred * lax.rsqrt((centred * centred).mean(-1, keepdims=True) + self.eps)
        normed = normed * self.weight[...].astype(jnp.float32)
        bias = 0.0 if self.bias is None else self.bias[...].astype(jnp.float32)
        return (normed + bias).astype(x.dtype)


Norm = RMSNorm | LayerNorm


class WidthNorm(nnx.Module):
    """The weight of an RMSNorm over several heads at once, which may lie on several devices, or of norms of
    heads that have weights of their own.
    """

    def __init__(self, heads: tuple[int, ...], *, dtype: jnp.dtype) -> None:
        self.weight = param(heads, dtype, ("kv_heads", *(None,) * (len(heads) - 1)))
