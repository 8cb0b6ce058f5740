"""Residual addition and RMSNorm in Pallas (Triton backend): one program a row."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from lmdeploy_jax.pallas_kernels.launch import Launch, launch
from lmdeploy_jax.pallas_kernels.round_rows.pallas import shapes_of, store_rounded, warps_of
from lmdeploy_jax.pallas_kernels.shapes import Quantised


def add_rms_norm(
    x: Float[Array, "T E"],
    parts: Float[Array, "S T E"],
    weight: Float[Array, "E"],
    *,
    eps: float,
    offset: float,
    interpret: bool,
) -> tuple[Float[Array, "T E"], Float[Array, "T E"]]:
    """See `lmdeploy_jax.pallas_kernels.norm`."""
    like = jax.ShapeDtypeStruct(x.shape, x.dtype)
    kernel = functools.partial(_kernel, eps=eps, offset=offset)
    added, normed = launch(kernel, _how(x), [like, like], x, parts, weight, interpret=interpret)
    return added, normed


def add_rms_norm_quant(
    x: Float[Array, "T E"],
    parts: Float[Array, "S T E"],
    weight: Float[Array, "E"],
    dtype: DTypeLike,
    groups: int,
    scale: Float32[Array, "1"] | None,
    *,
    eps: float,
    offset: float,
    interpret: bool,
) -> tuple[Float[Array, "T E"], Quantised]:
    """See `lmdeploy_jax.pallas_kernels.norm`."""
    out = [jax.ShapeDtypeStruct(x.shape, x.dtype), *shapes_of(x, dtype, groups)]
    kernel = functools.partial(_quant_kernel, eps=eps, offset=offset)
    added, *normed = launch(kernel, _how(x), out, x, parts, weight, scale, interpret=interpret)
    return added, Quantised(*normed)


def _how(x: Float[Array, "T E"]) -> Launch:
    rows, size = x.shape
    return Launch("add_rms_norm", (rows,), warps_of(size), num_stages=1, aliases={0: 0})


def _kernel(
    x_ref: jax.Ref,
    parts_ref: jax.Ref,
    weight_ref: jax.Ref,
    added_ref: jax.Ref,
    normed_ref: jax.Ref,
    *,
    eps: float,
    offset: float,
) -> None:
    row, size = pl.program_id(0), x_ref.shape[1]
    column = jnp.arange(pl.next_power_of_2(size), dtype=jnp.int32)
    mask = column < size
    added = add(x_ref, parts_ref, added_ref)
    weight = plt.load(weight_ref.at[column], mask=mask, other=0)
    wide = added.astype(jnp.float32)
    normed = weigh(wide * inverse_rms(wide, size, eps), weight, offset, x_ref.dtype)
    plt.store(normed_ref.at[row, column], normed, mask=mask)


def _quant_kernel(
    x_ref: jax.Ref,
    parts_ref: jax.Ref,
    weight_ref: jax.Ref,
    scale_ref: jax.Ref | None,
    added_ref: jax.Ref,
    values_ref: jax.Ref,
    scales_ref: jax.Ref,
    *,
    eps: float,
    offset: float,
) -> None:
    """The weight is read first: it is in no cache, and no read overtakes the store of what is added."""
    row, size = pl.program_id(0), x_ref.shape[1]
    column = jnp.arange(pl.next_power_of_2(size), dtype=jnp.int32)
    weight = plt.load(weight_ref.at[column], mask=column < size, other=0)
    wide = add(x_ref, parts_ref, added_ref).astype(jnp.float32)
    normed = weigh(wide * inverse_rms(wide, size, eps), weight, offset, x_ref.dtype)
    store_rounded(normed.astype(jnp.float32), row, values_ref, scales_ref, scale_ref)


def add(x_ref: jax.Ref, parts_ref: jax.Ref, added_ref: jax.Ref) -> Float[Array, "padded"]:
    """This program's row of x with its parts, which is stored; zeros beyond the last column."""
    row, size = pl.program_id(0), x_ref.shape[1]
    column = jnp.arange(pl.next_power_of_2(size), dtype=jnp.int32)
    mask = column < size
    total = plt.load(x_ref.at[row, column], mask=mask, other=0).astype(jnp.float32)
    for part in range(parts_ref.shape[0]):
        total += plt.load(parts_ref.at[part, row, column], mask=mask, other=0).astype(jnp.float32)
    added = total.astype(x_ref.dtype)
    plt.store(added_ref.at[row, column], added, mask=mask)
    return added


def inverse_rms(wide: Float32[Array, "*rows N"], size: int, eps: float) -> Float32[Array, "*rows 1"]:
    """1 / RMS of the last axis, which is padded with zeros beyond `size` columns."""
    return lax.rsqrt(jnp.sum(wide * wide, axis=-1, keepdims=True) * (1.0 / size) + eps)


def weigh(
    normed: Float32[Array, "*rows N"], weight: Float[Array, "*any N"], offset: float, dtype: jnp.dtype
) -> Float[Array, "*rows N"]:
    """Multiplies by the weight, rounding where `rms_norm` of the XLA path does."""
    if offset:
        return (normed * (weight.astype(jnp.float32) + offset)).astype(dtype)
    rounded = normed.astype(dtype).astype(jnp.float32)
    return (rounded * weight.astype(jnp.float32)).astype(dtype)
