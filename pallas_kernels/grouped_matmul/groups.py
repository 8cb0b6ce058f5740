"""Which rows of a grouped product belong to which weight: sorted by group, and cut into tiles."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int32

LEAST_ROWS, MOST_ROWS = 8, 128  # of a tile


class RowGroups(NamedTuple):
    """M rows, each of which is to be multiplied with one of X weights, and the order that lays them together.

    source: of each sorted row, its place before sorting; place: of each row before sorting, its sorted place.
    tiles: the work list: group, first sorted row, and how many rows of that group from there on; the tiles in
    use come first, in the order of their rows, and the others have no rows.
    """

    source: Int32[Array, "M"]
    place: Int32[Array, "M"]
    group: Int32[Array, "M"]  # of each sorted row
    tiles: Int32[Array, "W 3"]


def tile_rows(rows: int, groups: int) -> int:
    """Rows of a tile: about as many as a group has, a power of two."""
    mean = max(1, -(-rows // groups))
    return min(max(1 << (mean - 1).bit_length(), LEAST_ROWS), MOST_ROWS)


def group_rows(groups: Int32[Array, "M"], count: int) -> RowGroups:
    """The rows of `groups`, numbers from 0 to `count` - 1, laid together.

    There are never more tiles than one a group that has rows and one for each full tile's worth of rows.
    """
    rows = groups.shape[0]
    height = tile_rows(rows, count)
    source = jnp.argsort(groups, stable=True).astype(jnp.int32)
    place = jnp.zeros(rows, jnp.int32).at[source].set(jnp.arange(rows, dtype=jnp.int32))
    sizes = jnp.zeros(count, jnp.int32).at[groups].add(1)
    starts, tiles_of = jnp.cumsum(sizes) - sizes, -(-sizes // height)
    ends = jnp.cumsum(tiles_of)
    tile = jnp.arange(min(count, rows) + rows // height, dtype=jnp.int32)
    group = jnp.minimum(jnp.searchsorted(ends, tile, side="right"), count - 1).astype(jnp.int32)
    within = (tile - (ends - tiles_of)[group]) * height
    used = jnp.where(tile < ends[-1], jnp.minimum(sizes[group] - within, height), 0)
    return RowGroups(source, place, groups[source], jnp.stack([group, starts[group] + within, used], axis=1))
