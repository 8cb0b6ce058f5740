"""Rows laid together by group, in Pallas (Triton backend): a counting sort in one launch.

One program a group: it counts the rows of smaller groups, which is where its own begin, and writes its own
in their order. Nothing crosses programs, since each has slots of the work list that no other can need: as
many as it has rows where rows are fewer than groups, else those from `start // height + group` on, which
leave it one for each tile. Slots without rows lie between the others.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Int32

from lmdeploy_jax.pallas_kernels.grouped_matmul.groups import RowGroups
from lmdeploy_jax.pallas_kernels.launch import Launch, launch

CHUNK = 1024  # rows that a program looks at in one go


def group_rows(groups: Int32[Array, "M"], count: int, height: int, *, interpret: bool) -> RowGroups:
    """See `groups.group_rows`, for tiles of `height` rows."""
    rows = groups.shape[0]
    width = rows if rows < count else rows // height + count
    row = jax.ShapeDtypeStruct((rows,), jnp.int32)
    out = [row, row, row, jax.ShapeDtypeStruct((width, 3), jnp.int32)]
    how = Launch("group_rows", (count,), num_warps=4 if rows > 128 else 1, num_stages=1)
    kernel = functools.partial(_kernel, count=count, height=height)
    return RowGroups(*launch(kernel, how, out, groups, interpret=interpret))


def _kernel(
    groups_ref: jax.Ref,
    source_ref: jax.Ref,
    place_ref: jax.Ref,
    group_ref: jax.Ref,
    tiles_ref: jax.Ref,
    *,
    count: int,
    height: int,
) -> None:
    rows, group = groups_ref.shape[0], pl.program_id(0)
    chunk = min(pl.next_power_of_2(rows), CHUNK)

    def read(index: jax.Array) -> tuple[jax.Array, jax.Array]:
        row = index * chunk + jnp.arange(chunk, dtype=jnp.int32)
        return row, plt.load(groups_ref.at[row], mask=row < rows, other=count)

    def add_up(index: jax.Array, counts: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        _, groups = read(index)
        return counts[0] + _sum(groups < group), counts[1] + _sum(groups == group)

    def write(index: jax.Array, first: jax.Array) -> jax.Array:
        row, groups = read(index)
        mine = groups == group
        # No other row's place may be named, masked or not: the interpreter stores what was there before.
        place = jnp.where(mine, first + jnp.cumsum(mine.astype(jnp.int32)) - 1, rows)
        plt.store(source_ref.at[place], row, mask=mine)
        plt.store(place_ref.at[row], place, mask=mine)
        plt.store(group_ref.at[place], groups, mask=mine)
        return first + _sum(mine)

    chunks = pl.cdiv(rows, chunk)
    start, size = lax.fori_loop(0, chunks, add_up, (jnp.int32(0), jnp.int32(0)))
    _list_tiles(tiles_ref, rows < count, start, size, height)

    @pl.when(size > 0)
    def _write_rows() -> None:
        lax.fori_loop(0, chunks, write, start)


def _list_tiles(tiles_ref: jax.Ref, few: bool, start: jax.Array, size: jax.Array, height: int) -> None:
    """This group's slots, used or not. `few`: whether there are fewer rows than groups."""
    group, width = pl.program_id(0), tiles_ref.shape[0]
    begin = start if few else lax.div(start, height) + group
    end = start + size if few else lax.div(start + size, height) + group + 1
    most = width if few else width - pl.num_programs(0) + 1
    tile = jnp.arange(pl.next_power_of_2(most), dtype=jnp.int32)
    used = jnp.clip(size - tile * height, 0, height)
    for column, value in enumerate((jnp.full_like(tile, group), start + tile * height, used)):
        at = tiles_ref.at[begin + tile, jnp.full_like(tile, column)]
        plt.store(at, value, mask=begin + tile < end)


def _sum(flags: jax.Array) -> jax.Array:
    return jnp.sum(flags.astype(jnp.int32))
