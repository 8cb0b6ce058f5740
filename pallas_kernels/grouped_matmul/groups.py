"""Which rows of a grouped product belong to which weight: sorted by group, and cut into tiles."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int32

LEAST_ROWS, MOST_ROWS = {"xla": 8, "pallas": 16}, 128  # of a tile


class RowGroups(NamedTuple):
    """M rows, each of which is to be multiplied with one of X weights, and the order that lays them together.

    source: of each sorted row, its place before sorting; place: of each row before sorting, its sorted place.
    tiles: the work list: group, first sorted row, and how many rows of that group from there on, in the order
    of the rows; slots that are not in use have no rows, and come last for the loop of `xla.py`. Of rows that
    all have different groups it may be these alone, for the kernels.
    """

    source: Int32[Array, "M"]
    place: Int32[Array, "M"]
    group: Int32[Array, "M"]  # of each sorted row
    tiles: Int32[Array, "W 3"] | Int32[Array, "M"]


def tile_rows(rows: int, groups: int, backend: str) -> int:
    """Rows of a tile, a power of two: about as many as a group has.

    Twice as many for a kernel, whose tiles cost the same with fewer rows: few groups then need two tiles, and
    their weight twice.
    """
    mean = max(1, -(-rows // groups)) * (1 if backend == "xla" else 2)
    least = LEAST_ROWS["xla" if backend == "xla" else "pallas"]
    return min(max(1 << (mean - 1).bit_length(), least), MOST_ROWS)


def group_rows(groups: Int32[Array, "M"], count: int, height: int) -> RowGroups:
    """The rows of `groups`, numbers from 0 to `count` - 1, laid together, in tiles of `height` rows.

    There are never more tiles than one a group that has rows and one for each full tile's worth of rows.
    """
    rows = groups.shape[0]
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
