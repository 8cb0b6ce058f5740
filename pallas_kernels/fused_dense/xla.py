"""Products with an epilogue as plain XLA operations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Activation = Callable[[Array], Array]


@dataclass(frozen=True)
class RowNorm:
    """A norm of rows before a product, whose weight and bias are in the product's.

    column_sums: f32 [N], of each output's weights as they are held: LayerNorm; None: RMSNorm.
    """

    eps: float
    column_sums: Float[Array, "N"] | None = None


def row_scales(
    total: Float[Array, "..."], squares: Float[Array, "..."], columns: int, eps: float, centres: bool
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """A row's mean and the inverse of its deviation (from zero, unless the norm centres), of its sum and the
    sum of its squares.
    """
    mean = total / columns
    variance = jnp.maximum(squares / columns - (mean * mean if centres else 0.0), 0.0)
    return mean, jax.lax.rsqrt(variance + eps)


def fused_dense(
    x: Float[Array, "T K"],
    weight: Float[Array, "N K"],
    bias: Float[Array, "N"],
    activation: Activation | None = None,
    norm: RowNorm | None = None,
    residual: Float[Array, "T N"] | None = None,
) -> Float[Array, "T N"]:
    """See `lmdeploy_jax.pallas_kernels.fused_dense`."""
    y = jnp.einsum("tk,nk->tn", x, weight, preferred_element_type=jnp.float32)
    if norm is not None:
        wide = x.astype(jnp.float32)
        total, squares, centres = wide.sum(axis=1), (wide * wide).sum(axis=1), norm.column_sums is not None
        mean, scale = row_scales(total, squares, x.shape[1], norm.eps, centres)
        y = y - mean[:, None] * norm.column_sums if norm.column_sums is not None else y
        y = y * scale[:, None]
    y = y + bias.astype(jnp.float32)
    y = y if activation is None else activation(y)
    return (y if residual is None else residual.astype(jnp.float32) + y).astype(x.dtype)


def gelu(x: Float[Array, "*any"]) -> Float[Array, "*any"]:
    """x P(N <= x), whose odds' logarithm in base 2 is a polynomial: for bfloat16, beside whose rounding
    (2 ** -9) the relative error for x > -5, 1.2e-3, is small; some ten instructions, erf takes 33.
    """
    square = x * x
    odds = x * (2.297166 + square * (0.10953641 + square * (-0.0014344082 + square * 1.3276435e-05)))
    root = jax.lax.rsqrt(1 + jnp.exp2(-odds))
    return x * root * root
