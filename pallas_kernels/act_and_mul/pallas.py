"""Gate and up in parts, in Pallas (Triton backend): a program has some columns of a row, or rounds all."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Shaped

from lmdeploy_jax.pallas_kernels.launch import Launch, launch
from lmdeploy_jax.pallas_kernels.round_rows.pallas import shapes_of, store_rounded, warps_of
from lmdeploy_jax.pallas_kernels.shapes import Quantised
from lmdeploy_jax.pallas_kernels.skinny_gemm.pallas import gated

BLOCK = 512  # columns of a program
WARPS = 4


def act_and_mul(
    parts: Float32[Array, "S T 2 N"],
    activation: Callable[[jax.Array], jax.Array],
    out_dtype: DTypeLike,
    *,
    interpret: bool,
) -> Float[Array, "T N"]:
    """See `lmdeploy_jax.pallas_kernels.act_and_mul`."""
    _, rows, _, columns = parts.shape
    how = Launch("act_and_mul", (rows, pl.cdiv(columns, BLOCK)), WARPS, num_stages=1)
    out = jax.ShapeDtypeStruct((rows, columns), out_dtype)
    return launch(functools.partial(_kernel, activation=activation), how, out, parts, interpret=interpret)


def _kernel(parts_ref: jax.Ref, out_ref: jax.Ref, *, activation: Callable[[jax.Array], jax.Array]) -> None:
    row, column = pl.program_id(0), pl.program_id(1) * BLOCK + jnp.arange(BLOCK, dtype=jnp.int32)
    mask = column < out_ref.shape[1]

    def total(half: int) -> jax.Array:
        parts = [
            plt.load(parts_ref.at[part, row, half, column], mask=mask, other=0)
            for part in range(parts_ref.shape[0])
        ]
        return functools.reduce(jnp.add, parts)

    out = gated(total(0), total(1), activation, out_ref.dtype)
    plt.store(out_ref.at[row, column], out, mask=mask)


def act_and_mul_quant(
    sums: Shaped[Array, "S T 2 N"],
    dtype: DTypeLike,
    activation: Callable[[jax.Array], jax.Array],
    out_dtype: DTypeLike,
    *,
    row_scales: Float32[Array, "T"] | None,
    scales: Float32[Array, "2 N"] | None,
    groups: int,
    scale: Float32[Array, "1"] | None,
    interpret: bool,
) -> Quantised:
    """See `lmdeploy_jax.pallas_kernels.act_and_mul`."""
    _, rows, _, columns = sums.shape
    how = Launch("act_and_mul_quant", (rows,), warps_of(columns), num_stages=1)
    out = shapes_of(jax.ShapeDtypeStruct((rows, columns), out_dtype), dtype, groups)
    kernel = functools.partial(_quant_kernel, activation=activation, dtype=jnp.dtype(out_dtype))
    return Quantised(*launch(kernel, how, out, sums, row_scales, scales, scale, interpret=interpret))


def _quant_kernel(
    sums_ref: jax.Ref,
    row_scales_ref: jax.Ref | None,
    column_scales_ref: jax.Ref | None,
    scale_ref: jax.Ref | None,
    values_ref: jax.Ref,
    scales_ref: jax.Ref,
    *,
    activation: Callable[[jax.Array], jax.Array],
    dtype: jnp.dtype,
) -> None:
    row, size = pl.program_id(0), values_ref.shape[1]
    column = jnp.arange(pl.next_power_of_2(size), dtype=jnp.int32)
    mask = column < size

    def total(half: int) -> jax.Array:
        parts = [
            plt.load(sums_ref.at[part, row, half, column], mask=mask, other=0).astype(jnp.float32)
            for part in range(sums_ref.shape[0])
        ]
        found = functools.reduce(jnp.add, parts)
        if row_scales_ref is None or column_scales_ref is None:
            return found
        scales = plt.load(column_scales_ref.at[half, column], mask=mask, other=0)
        return found * (plt.load(row_scales_ref.at[row]) * scales)

    inner = gated(total(0), total(1), activation, dtype)
    store_rounded(inner.astype(jnp.float32), row, values_ref, scales_ref, scale_ref)
