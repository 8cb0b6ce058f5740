"""Quantised products as plain XLA operations: both sides widened to float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Shaped

from lmdeploy_jax.pallas_kernels.quant_gemm.words import TILE, unpack_words
from lmdeploy_jax.pallas_kernels.shapes import Quantised


def quant_gemm(
    x: Float[Array, "T K"] | Quantised, weight: Quantised, splits: int
) -> Float32[Array, "{splits} halves T N"]:
    """See `lmdeploy_jax.pallas_kernels.quant_gemm`; weight [halves, N, K]."""
    rows = dequantise(x) if isinstance(x, Quantised) else x.astype(jnp.float32)
    wide = dequantise(weight)
    left, right = (array.reshape(*array.shape[:-1], splits, -1) for array in (rows, wide))
    return jnp.einsum("tsk,hnsk->shtn", left, right, precision=lax.Precision.HIGHEST)


def dequantise(matrix: Quantised) -> Float32[Array, "..."]:
    """[*rows, K]."""
    values, zero = matrix.values, 0.0
    if values.dtype == jnp.uint16:
        values, zero = unpack_words(values, TILE), 8.0
    columns = values.shape[-1]
    zeros = zero if matrix.zeros is None else _by_column(matrix.zeros, columns)
    return (values.astype(jnp.float32) - zeros) * _by_column(matrix.scales, columns)


def _by_column(grouped: Shaped[Array, "..."], columns: int) -> jax.Array:
    """[G, *rows] -> [*rows, K]."""
    moved = jnp.moveaxis(grouped.astype(jnp.float32), 0, -1)
    return jnp.repeat(moved, columns // moved.shape[-1], axis=-1)
