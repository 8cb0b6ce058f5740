"""Grouped products as plain XLA operations: a loop over the tiles in use, which reads no other weights."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int32

from lmdeploy_jax.pallas_kernels.grouped_matmul.groups import RowGroups
from lmdeploy_jax.pallas_kernels.quant_gemm.xla import dequantise
from lmdeploy_jax.pallas_kernels.shapes import Quantised

Gating = Callable[..., jax.Array]  # of a block's one product, or of its gate and up
WeightOf = Callable[[Int32[Array, ""]], Float[Array, "N K"]]


def grouped_matmul(
    rows: Float[Array, "M K"],
    weight_of: WeightOf,
    tiles: Int32[Array, "W 3"],
    *,
    out: int,
    height: int,
    out_dtype: DTypeLike,
) -> Float[Array, "M N"]:
    """See `lmdeploy_jax.pallas_kernels.grouped_matmul`; `weight_of` gives a group's weight [out, K].

    A tile's product covers `height` rows, whatever it has of them: the next tile overwrites the rest.
    """
    padded = jnp.pad(rows, ((0, height), (0, 0)))
    precision = lax.Precision.HIGHEST if rows.dtype == jnp.float32 else None

    def multiply(i: Array, product: Array) -> Array:
        group, first = tiles[i, 0], tiles[i, 1]
        tile = lax.dynamic_slice_in_dim(padded, first, height)
        axes = (((1,), (1,)), ((), ()))
        block = lax.dot_general(
            tile, weight_of(group), axes, precision=precision, preferred_element_type=out_dtype
        )
        return lax.dynamic_update_slice_in_dim(product, block.astype(out_dtype), first, axis=0)

    used = jnp.sum(tiles[:, 2] > 0)
    product = lax.fori_loop(0, used, multiply, jnp.zeros((padded.shape[0], out), out_dtype))
    return product[: rows.shape[0]]


def gated_grouped_matmul(
    x: Float[Array, "T K"],
    weight: Float[Array, "X H N K"] | Quantised,
    bias: Float[Array, "X H N"] | None,
    groups: RowGroups,
    gating: Gating,
    height: int,
) -> Float[Array, "M N"]:
    """See `lmdeploy_jax.pallas_kernels.grouped_matmul`."""
    rows = x[groups.source // (groups.source.shape[0] // x.shape[0])]
    halves = _multiplied(rows, weight, groups, height)
    halves = (halves if bias is None else halves + bias[groups.group].astype(jnp.float32)).astype(x.dtype)
    return gating(*jnp.unstack(halves.astype(jnp.float32), axis=1)).astype(x.dtype)


def weighted_grouped_matmul(
    rows: Float[Array, "M K"],
    weight: Float[Array, "X N K"] | Quantised,
    bias: Float[Array, "X N"] | None,
    groups: RowGroups,
    scales: Float32[Array, "T k"],
    beside: Float[Array, "T N"] | None,
    height: int,
    out_dtype: DTypeLike,
) -> Float[Array, "k T N"]:
    """See `lmdeploy_jax.pallas_kernels.grouped_matmul`."""
    product = _multiplied(rows, weight, groups, height)
    product = product if bias is None else product + bias[groups.group].astype(jnp.float32)
    parts = product[groups.place].reshape(*scales.shape, -1) * scales[:, :, None]
    parts = parts.swapaxes(0, 1)
    return (parts if beside is None else parts.at[0].add(beside)).astype(out_dtype)


def _multiplied(
    rows: Float[Array, "M K"], weight: Float[Array, "X *out K"] | Quantised, groups: RowGroups, height: int
) -> Float32[Array, "M *out"]:
    """Weights of few bits are not rounded to those of the rows: this is what the kernels are held against."""
    out = outputs(weight)[1:]
    rows = rows.astype(jnp.float32) if isinstance(weight, Quantised) else rows

    def weight_of(group: Int32[Array, ""]) -> Float[Array, "N K"]:
        return _group(weight, group).reshape(prod(out), -1)

    how = {"out": prod(out), "height": height, "out_dtype": jnp.float32}
    return grouped_matmul(rows, weight_of, groups.tiles, **how).reshape(-1, *out)


def outputs(weight: Float[Array, "..."] | Quantised) -> tuple[int, ...]:
    """[X, *out] of weights [X, *out, K]."""
    return (weight.values if isinstance(weight, Quantised) else weight).shape[:-1]


def _group(weight: Float[Array, "..."] | Quantised, group: Int32[Array, ""]) -> Float[Array, "..."]:
    if not isinstance(weight, Quantised):
        return lax.dynamic_index_in_dim(weight, group, keepdims=False)
    scales, zeros = (None if each is None else each[:, group] for each in weight[1:])
    assert scales is not None
    return dequantise(Quantised(weight.values[group], scales, zeros))
