"""Products of rows with the weight of the group that each belongs to, as a mixture's experts need them."""

from __future__ import annotations

from functools import partial

from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from lmdeploy_jax.pallas_kernels.grouped_matmul import xla
from lmdeploy_jax.pallas_kernels.grouped_matmul.groups import RowGroups, group_rows, tile_rows
from lmdeploy_jax.pallas_kernels.grouped_matmul.xla import WeightOf

__all__ = ["RowGroups", "WeightOf", "group_rows", "grouped_matmul", "grouped_matmul_of", "tile_rows"]


def grouped_matmul(
    rows: Float[Array, "M K"], weight: Float[Array, "X N K"], groups: RowGroups, *, out_dtype: DTypeLike
) -> Float[Array, "M N"]:
    """The product of each sorted row with its group's weight: `rows[i] @ weight[group of i].T`.

    rows are in the order of `groups.source`. Only weights of groups that have rows are read. Raises
    ValueError for shapes that do not fit.
    """
    if rows.shape[1] != weight.shape[2] or rows.shape[0] != groups.source.shape[0]:
        raise ValueError(
            f"rows {rows.shape} fit neither the weights {weight.shape}, [X, N, K], nor the "
            f"{groups.source.shape[0]} rows that were grouped"
        )
    weight_of = partial(lax.dynamic_index_in_dim, weight, keepdims=False)
    shape = (weight.shape[0], weight.shape[1])
    return grouped_matmul_of(rows, weight_of, groups, shape=shape, out_dtype=out_dtype)


def grouped_matmul_of(
    rows: Float[Array, "M K"],
    weight_of: WeightOf,
    groups: RowGroups,
    *,
    shape: tuple[int, int],
    out_dtype: DTypeLike,
) -> Float[Array, "M N"]:
    """The same with weights that `weight_of` makes as they are needed, one a group, of `shape` (X, N)."""
    height = tile_rows(rows.shape[0], shape[0])
    return xla.grouped_matmul(rows, weight_of, groups.tiles, out=shape[1], height=height, out_dtype=out_dtype)
