"""Quantised products as plain XLA operations: both sides widened to float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Shaped

from lmdeploy_jax.pallas_kernels.norm.xla import add_rms_norm, rms_norm
from lmdeploy_jax.pallas_kernels.quant_gemm.words import E2M1_VALUES, PER_WORD, tile_of, unpack_words
from lmdeploy_jax.pallas_kernels.round_rows.xla import round_rows
from lmdeploy_jax.pallas_kernels.shapes import Quantised, Unscaled
from lmdeploy_jax.pallas_kernels.skinny_gemm.xla import unscaled_norm


def quant_gemm(
    x: Float[Array, "T K"] | Quantised, weight: Quantised, splits: int
) -> Float32[Array, "{splits} halves T N"]:
    """See `lmdeploy_jax.pallas_kernels.quant_gemm`; weight [halves, N, K]."""
    # On GPUs, XLA would leave out a rounding that the same program undoes.
    rows = dequantise(lax.optimization_barrier(x)) if isinstance(x, Quantised) else x.astype(jnp.float32)
    wide = dequantise(weight)
    left, right = (array.reshape(*array.shape[:-1], splits, -1) for array in (rows, wide))
    return jnp.einsum("tsk,hnsk->shtn", left, right, precision=lax.Precision.HIGHEST)


def norm_quant_gemm(
    x: Float[Array, "1 K"],
    parts: Float[Array, "S 1 K"],
    norm: Float[Array, "K"],
    weight: Quantised,
    rounding: tuple[DTypeLike, int] | None,
    *,
    eps: float,
    offset: float,
) -> tuple[Float[Array, "1 K"], Float32[Array, "halves 1 N"]]:
    """See `lmdeploy_jax.pallas_kernels.quant_gemm`; weight [halves, N, K].

    rounding: the dtype to which what is normed is rounded, and in how many groups of columns.
    """
    added, _ = add_rms_norm(x, parts, norm, eps=eps, offset=offset)
    added = lax.optimization_barrier(added)  # rounded to 16 bits, which XLA would leave out
    normed = rms_norm(added.astype(jnp.float32), norm.astype(jnp.float32), eps=eps, offset=offset)
    rows = normed if rounding is None else round_rows(normed, *rounding)
    return added, quant_gemm(rows, weight, 1)[0]


def unscaled_norm_quant_gemm(
    x: Float[Array, "1 K"],
    parts: Float[Array, "S 1 K"],
    norm: Float[Array, "K"],
    weight: Quantised,
    splits: int,
    rounded: int | None,
    *,
    eps: float,
    offset: float,
) -> tuple[Float[Array, "1 K"], Unscaled]:
    """See `lmdeploy_jax.pallas_kernels.quant_gemm`; weight [1, N, K]. rounded: groups of columns, if any."""
    added, _ = add_rms_norm(x, parts, norm, eps=eps, offset=offset)
    weighed, mean_squares = unscaled_norm(added, norm, splits, eps, offset)
    rows = weighed if rounded is None else round_rows(weighed, weight.values.dtype, rounded)
    return added, Unscaled(quant_gemm(rows, weight, splits)[:, 0], mean_squares)


def dequantise(matrix: Quantised) -> Float32[Array, "..."]:
    """[*rows, K]."""
    values, scales, zero = matrix.values, matrix.scales, 0.0
    if values.dtype == jnp.uint16:
        codes = unpack_words(values, tile_of(values.shape[-1] * PER_WORD))
        e2m1 = scales.dtype == jnp.uint8
        values, zero = (jnp.array(E2M1_VALUES)[codes], 0.0) if e2m1 else (codes, 8.0)
    if scales.dtype == jnp.uint8:  # the byte is the exponent of a float32
        scales = lax.bitcast_convert_type(scales.astype(jnp.uint32) << 23, jnp.float32)
    columns = values.shape[-1]
    zeros = zero if matrix.zeros is None else _by_column(matrix.zeros, columns)
    return (values.astype(jnp.float32) - zeros) * _by_column(scales, columns)


def _by_column(grouped: Shaped[Array, "..."], columns: int) -> jax.Array:
    """[G, *rows] -> [*rows, K]."""
    moved = jnp.moveaxis(grouped.astype(jnp.float32), 0, -1)
    return jnp.repeat(moved, columns // moved.shape[-1], axis=-1)
