"""Grouped products as plain XLA operations: a loop over the tiles in use, which reads no other weights."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

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
