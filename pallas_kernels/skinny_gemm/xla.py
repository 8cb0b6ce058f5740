"""Skinny products as plain XLA operations."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from lmdeploy_jax.pallas_kernels.norm.xla import add_rms_norm
from lmdeploy_jax.pallas_kernels.shapes import Unscaled


def skinny_gemm(
    x: Float[Array, "T K"],
    weight: Float[Array, "N K"],
    bias: Float[Array, "N"] | None,
    splits: int,
    out_dtype: DTypeLike,
) -> Float[Array, "{splits} T N"]:
    """See `lmdeploy_jax.pallas_kernels.skinny_gemm`."""
    parts = lax.dot_general(
        x.reshape(x.shape[0], splits, -1),
        weight.reshape(weight.shape[0], splits, -1),
        (((2,), (2,)), ((1,), (1,))),
        precision=_precision(x),
        preferred_element_type=jnp.float32,
    )
    return (parts if bias is None else parts.at[0].add(bias)).astype(out_dtype)


def gated_skinny_gemm(
    x: Float[Array, "T K"], weight: Float[Array, "2 N K"], activation: Callable[[jax.Array], jax.Array]
) -> Float[Array, "T N"]:
    """See `lmdeploy_jax.pallas_kernels.skinny_gemm`."""
    inner = jnp.einsum("tk,gnk->gtn", x, weight, precision=_precision(x))
    return activation(inner[0]) * inner[1]


def norm_skinny_gemm(
    x: Float[Array, "1 K"],
    parts: Float[Array, "S 1 K"],
    norm: Float[Array, "K"],
    weight: Float[Array, "halves N K"],
    activation: Callable[[jax.Array], jax.Array] | None,
    *,
    eps: float,
    offset: float,
    out_dtype: DTypeLike,
) -> tuple[Float[Array, "1 K"], Float[Array, "1 N"]]:
    """See `lmdeploy_jax.pallas_kernels.skinny_gemm`; one or two halves."""
    added, normed = add_rms_norm(x, parts, norm, eps=eps, offset=offset)
    if activation is None:
        return added, skinny_gemm(normed, weight[0], None, 1, out_dtype)[0]
    return added, gated_skinny_gemm(normed, weight, activation).astype(out_dtype)


def unscaled_norm_skinny_gemm(
    x: Float[Array, "1 K"],
    parts: Float[Array, "S 1 K"],
    norm: Float[Array, "K"],
    weight: Float[Array, "N K"],
    splits: int,
    *,
    eps: float,
    offset: float,
) -> tuple[Float[Array, "1 K"], Unscaled]:
    """See `lmdeploy_jax.pallas_kernels.skinny_gemm`."""
    added, _ = add_rms_norm(x, parts, norm, eps=eps, offset=offset)
    weighed, mean_squares = unscaled_norm(added, norm, splits, eps, offset)
    product = skinny_gemm(weighed.astype(x.dtype), weight, None, splits, jnp.float32)
    return added, Unscaled(product, mean_squares)


def unscaled_norm(
    added: Float[Array, "1 K"], norm: Float[Array, "K"], splits: int, eps: float, offset: float
) -> tuple[Float32[Array, "1 K"], Float32[Array, "{splits}"]]:
    """An RMSNorm without its scale, and what makes the scale, see `Unscaled`."""
    wide = lax.optimization_barrier(added).astype(jnp.float32)  # rounded, which XLA would leave out
    squares = jnp.square(wide).reshape(splits, -1).sum(1) / added.shape[1]
    return wide * (norm.astype(jnp.float32) + offset), squares + eps / splits


def _precision(x: jax.Array) -> lax.Precision | None:
    return lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
