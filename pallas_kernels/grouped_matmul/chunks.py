"""Many rows laid together by group, in Pallas (Triton backend): a counting sort in two launches.

The first counts the groups of each chunk of rows. A program of the second adds up what chunks before its own
have, and so knows where its rows go; one more lists the tiles. Nothing crosses programs of a launch, and the
order within a group is that of the rows, whichever program comes first.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Int32

from lmdeploy_jax.pallas_kernels.grouped_matmul.groups import RowGroups
from lmdeploy_jax.pallas_kernels.launch import Launch, launch

CHUNK = 256  # rows of a program
RANKED = 32  # rows that are placed in one go, beside all of their chunk's and all groups
BLOCK = 16  # rows, or chunks, that are looked at in one go beside all groups


class ChunkedGroups(NamedTuple):
    """What `group_rows` gives, its tiles in use first, and where each row before sorting goes if a tile's
    rows begin at the tile's number times its height, as TMA has it.
    """

    groups: RowGroups
    aligned: Int32[Array, "M"]


def group_rows(groups: Int32[Array, "M"], count: int, height: int, *, interpret: bool) -> ChunkedGroups:
    """See `groups.group_rows`, for tiles of `height` rows."""
    rows = groups.shape[0]
    chunks, width = pl.cdiv(rows, CHUNK), min(count, rows) + rows // height
    counts_shape = jax.ShapeDtypeStruct((chunks, count), jnp.int32)
    how = Launch("count_groups", (chunks,), num_warps=4, num_stages=1)
    counts = launch(_count, how, counts_shape, groups, interpret=interpret)
    row = jax.ShapeDtypeStruct((rows,), jnp.int32)
    out = [row, row, row, row, jax.ShapeDtypeStruct((width, 3), jnp.int32)]
    how = Launch("place_rows", (chunks + 1,), num_warps=8, num_stages=1)
    kernel = functools.partial(_place, height=height)
    source, place, aligned, group, tiles = launch(kernel, how, out, groups, counts, interpret=interpret)
    return ChunkedGroups(RowGroups(source, place, group, tiles), aligned)


def _count(groups_ref: jax.Ref, counts_ref: jax.Ref) -> None:
    rows, count, chunk = groups_ref.shape[0], counts_ref.shape[1], pl.program_id(0)
    group = jnp.arange(pl.next_power_of_2(count), dtype=jnp.int32)

    def add(index: jax.Array, total: jax.Array) -> jax.Array:
        row = chunk * CHUNK + index * BLOCK + jnp.arange(BLOCK, dtype=jnp.int32)
        found = plt.load(groups_ref.at[row], mask=row < rows, other=count)
        return total + jnp.sum((found[:, None] == group[None, :]).astype(jnp.int32), axis=0)

    total = lax.fori_loop(0, CHUNK // BLOCK, add, jnp.zeros_like(group))
    plt.store(counts_ref.at[chunk, group], total, mask=group < count)


def _place(
    groups_ref: jax.Ref,
    counts_ref: jax.Ref,
    source_ref: jax.Ref,
    place_ref: jax.Ref,
    aligned_ref: jax.Ref,
    group_ref: jax.Ref,
    tiles_ref: jax.Ref,
    *,
    height: int,
) -> None:
    chunk, chunks = pl.program_id(0), counts_ref.shape[0]
    before, sizes = _added_up(counts_ref, chunk)
    starts = jnp.cumsum(sizes) - sizes
    tiles_of = lax.div(sizes + (height - 1), height)
    ends = jnp.cumsum(tiles_of)
    first_tiles = ends - tiles_of

    @pl.when(chunk == chunks)
    def _list() -> None:
        _list_tiles(tiles_ref, (starts, sizes, first_tiles, tiles_of), height)

    @pl.when(chunk < chunks)
    def _write() -> None:
        rows, number = groups_ref.shape[0], jnp.arange(sizes.size, dtype=jnp.int32)

        def step(index: jax.Array, _: None) -> None:
            row, group, rank = _ranks(groups_ref, chunk, index)
            mine, valid = group[:, None] == number[None, :], (row < rows) & (group < counts_ref.shape[1])
            # A sum over all groups finds what a row's own has: registers cannot be indexed.
            sorted_place, aligned = (
                rank + jnp.sum(jnp.where(mine, each[None, :], 0), axis=1)
                for each in (before + starts, before + first_tiles * height)
            )
            # No other row's place may be named, masked or not: the interpreter stores what was there before.
            place = jnp.where(valid, sorted_place, rows)
            plt.store(source_ref.at[place], row, mask=valid)
            plt.store(group_ref.at[place], group, mask=valid)
            plt.store(place_ref.at[row], place, mask=valid)
            plt.store(aligned_ref.at[row], aligned, mask=valid)

        lax.fori_loop(0, CHUNK // RANKED, step, None)


def _added_up(counts_ref: jax.Ref, chunk: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What all groups have in the chunks before that one, and in all."""
    chunks, count = counts_ref.shape
    group = jnp.arange(pl.next_power_of_2(count), dtype=jnp.int32)

    def add(index: jax.Array, totals: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        number = index * BLOCK + jnp.arange(BLOCK, dtype=jnp.int32)
        mask = (number < chunks)[:, None] & (group < count)[None, :]
        found = plt.load(counts_ref.at[number[:, None], group[None, :]], mask=mask, other=0)
        before = jnp.where((number < chunk)[:, None], found, 0)
        return totals[0] + jnp.sum(before, axis=0), totals[1] + jnp.sum(found, axis=0)

    return lax.fori_loop(0, pl.cdiv(chunks, BLOCK), add, (jnp.zeros_like(group),) * 2)


def _ranks(groups_ref: jax.Ref, chunk: jax.Array, index: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Some rows of a chunk, their groups, and how many rows of its own group precede each in the chunk."""
    rows, first = groups_ref.shape[0], chunk * CHUNK
    row = first + index * RANKED + jnp.arange(RANKED, dtype=jnp.int32)
    other = first + jnp.arange(CHUNK, dtype=jnp.int32)
    group = plt.load(groups_ref.at[row], mask=row < rows, other=-1)
    found = plt.load(groups_ref.at[other], mask=other < rows, other=-1)
    earlier = (group[:, None] == found[None, :]) & (other[None, :] < row[:, None])
    return row, group, jnp.sum(earlier.astype(jnp.int32), axis=1)


def _list_tiles(tiles_ref: jax.Ref, groups: tuple[jax.Array, ...], height: int) -> None:
    """The tiles of all groups one after the other, then slots without rows."""
    starts, sizes, first_tiles, tiles_of = groups
    number = jnp.arange(sizes.size, dtype=jnp.int32)

    def write(tile: jax.Array, values: tuple[jax.Array, ...], mask: jax.Array) -> None:
        for column, value in enumerate(values):
            at = tiles_ref.at[jnp.where(mask, tile, tiles_ref.shape[0]), jnp.full_like(tile, column)]
            plt.store(at, value, mask=mask)

    def step(index: jax.Array, _: None) -> None:
        within = index * height
        values = number, starts + within, jnp.clip(sizes - within, 0, height)
        write(first_tiles + index, values, index < tiles_of)

    lax.fori_loop(0, jnp.max(tiles_of), step, None)
    slot = jnp.arange(pl.next_power_of_2(tiles_ref.shape[0]), dtype=jnp.int32)
    unused = (slot >= jnp.sum(tiles_of)) & (slot < tiles_ref.shape[0])
    write(slot, (jnp.zeros_like(slot),) * 3, unused)
