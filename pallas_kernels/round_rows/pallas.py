"""Rounding of rows in Pallas (Triton backend): one program a row."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int32, Shaped

from lmdeploy_jax.pallas_kernels.launch import Launch, launch
from lmdeploy_jax.pallas_kernels.round_rows.xla import LEAST, limit
from lmdeploy_jax.pallas_kernels.shapes import Quantised

UNIT = 1.5 * 2**23  # between 2^23 and 2^24, neighbours in f32 are 1 apart


def round_rows(x: Float[Array, "T K"], dtype: DTypeLike, groups: int, *, interpret: bool) -> Quantised:
    """See `lmdeploy_jax.pallas_kernels.round_rows`."""
    rows, size = x.shape
    how = Launch("round_rows", (rows,), warps_of(size), num_stages=1)
    out = shapes_of(x, dtype, groups)
    return Quantised(*launch(_kernel, how, out, x, interpret=interpret))


def warps_of(size: int) -> int:
    """Of a program that holds a row in registers."""
    return min(max(pl.next_power_of_2(size) // 512, 1), 16)


def shapes_of(
    x: Float[Array, "T K"] | jax.ShapeDtypeStruct, dtype: DTypeLike, groups: int
) -> list[jax.ShapeDtypeStruct]:
    """Values and scales."""
    scales = jax.ShapeDtypeStruct((groups, x.shape[0]), jnp.float32)
    return [jax.ShapeDtypeStruct(x.shape, dtype), scales]


def _kernel(x_ref: jax.Ref, values_ref: jax.Ref, scales_ref: jax.Ref) -> None:
    row, size = pl.program_id(0), x_ref.shape[1]
    column = jnp.arange(pl.next_power_of_2(size), dtype=jnp.int32)
    wide = plt.load(x_ref.at[row, column], mask=column < size, other=0).astype(jnp.float32)
    store_rounded(wide, row, values_ref, scales_ref)


def store_rounded(
    wide: Float32[Array, "padded"],
    row: Int32[Array, ""],
    values_ref: jax.Ref,
    scales_ref: jax.Ref,
    scale_ref: jax.Ref | None = None,
) -> None:
    """Rounds a row, padded with zeros to a power of two, and stores it with its scales, or the one of all."""
    size, groups = values_ref.shape[1], scales_ref.shape[0]
    width = wide.size if groups == 1 else size // groups
    blocks = wide.reshape(-1, width)
    largest = limit(values_ref.dtype)
    if scale_ref is None:
        scales = jnp.maximum(jnp.max(jnp.abs(blocks), axis=1), LEAST) / largest
    else:
        scales = plt.load(scale_ref.at[jnp.zeros(blocks.shape[:1], jnp.int32)])
    values = rounded(blocks / scales[:, None], values_ref.dtype).reshape(wide.shape)
    column = jnp.arange(wide.size, dtype=jnp.int32)
    plt.store(values_ref.at[row, column], values, mask=column < size)
    group = jnp.arange(scales.size, dtype=jnp.int32)
    plt.store(scales_ref.at[group, row], scales, mask=group < groups)


def rounded(scaled: Float32[Array, "*shape"], dtype: DTypeLike) -> Shaped[Array, "*shape"]:
    """The nearest elements of `dtype`, of two the even one.

    Integers are the last bits of floats whose neighbours are 1 apart: one addition rounds to them, where each
    instruction that rounds or converts takes four times as long.
    """
    largest = limit(dtype)
    scaled = jnp.clip(scaled, -largest, largest)
    if jnp.dtype(dtype) != jnp.int8:
        return scaled.astype(dtype)
    return lax.bitcast_convert_type(scaled + UNIT, jnp.int32).astype(dtype)
