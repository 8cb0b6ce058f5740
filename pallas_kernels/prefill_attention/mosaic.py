"""Ragged prefill attention in Mosaic GPU (Hopper), in the manner of FlashAttention-3 (Shah et al., 2024).

A work item is a tile of up to 128 queries and one query head. One warpgroup copies pages of K and V through
TMA into a ring of stages; two compute, each for 64 of the queries, and take turns: one multiplies while the
other is at its softmax. Programs are as many as cores, and each takes every so-manieth item.

What a reused page holds beyond a sequence's end is multiplied by zero, so it must be finite. It is: pages
start as zeros and hold keys and values of other tokens ever after.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int32

from lmdeploy_jax.pallas_kernels.options import AttentionOptions
from lmdeploy_jax.pallas_kernels.prefill_attention.tiles import SHORT
from lmdeploy_jax.pallas_kernels.shapes import PlainPages, Tiles

GROUPS = 2  # warpgroups (128 threads each) that compute
ROWS = 64  # queries a warpgroup
PAGES = 2  # a block of keys
LOWEST = -1e30
SWIZZLE = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))


@dataclass(frozen=True)
class Tuning:
    """Blocks of K and of V in flight; programs; whether the computing warpgroups take turns."""

    num_stages: int = 2
    programs: int = 132
    ping_pong: bool = True


def prefill_attention(
    q: Float[Array, "T H D"],
    k_pages: PlainPages,
    v_pages: PlainPages,
    page_table: Int32[Array, "S M"],
    tiles: Tiles,
    options: AttentionOptions,
    tuning: Tuning = Tuning(),
    live: Int32[Array, ""] | None = None,
) -> Float[Array, "T H D"]:
    """q with the outputs of all tiles that are not short in their rows. Those come first in `tiles`; where
    tiles of zeros, which nothing is done for, stand among them, `live` says where the last one is.
    """
    # XLA would make a call with slices of one array a graph of its own, recorded anew at every run.
    page_table, tiles = jnp.maximum(page_table, 0), jnp.maximum(tiles, 0)
    head_dim, stages = q.shape[2], tuning.num_stages
    keys = PAGES * k_pages.shape[2]
    live = (jnp.sum(tiles[:, 2] > SHORT, dtype=jnp.int32) if live is None else live)[None]
    body = functools.partial(_kernel, scale=options.scale, tuning=tuning)
    body.__name__ = "prefill_attention"  # type: ignore[attr-defined]  # what profiles call it
    kernel = plgpu.kernel(
        body,
        grid=(tuning.programs,),
        grid_names=("program",),
        num_threads=GROUPS + 1,
        thread_name="group",
        scratch_types=[
            plgpu.SMEM((GROUPS, ROWS, head_dim), q.dtype, transforms=SWIZZLE),
            plgpu.SMEM((stages, keys, head_dim), q.dtype, transforms=SWIZZLE),
            plgpu.SMEM((stages, keys, head_dim), q.dtype, transforms=SWIZZLE),
            plgpu.SMEM((GROUPS, ROWS, head_dim), q.dtype),
            plgpu.Barrier(num_barriers=GROUPS),
            *[plgpu.Barrier(num_arrivals=PAGES, num_barriers=stages)] * 2,
            *[plgpu.Barrier(num_arrivals=GROUPS, num_barriers=stages)] * 2,
            plgpu.Barrier(num_arrivals=GROUPS),
        ],
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup
        ),
    )
    rows = jax.new_ref(q)
    kernel(rows, k_pages, v_pages, page_table, tiles, live)
    return rows[...]


@dataclass(frozen=True)
class _Item:
    """A tile and a head."""

    head: jax.Array
    table_row: jax.Array
    start: jax.Array  # the first query, among all
    count: jax.Array
    position: jax.Array

    def blocks(self, rows: jax.Array | int, keys: int) -> jax.Array:
        """Blocks of keys that the first `rows` queries see."""
        return lax.div(self.position + lax.min(self.count, jnp.int32(rows)) + keys - 1, keys)


def _items(
    tiles_ref: jax.Ref, live_ref: jax.Ref, heads: int, programs: int, body: Callable[[_Item, Any], Any]
) -> None:
    """Runs `body(item, blocks before it)` for this program's items; it returns the blocks after it."""
    items = live_ref[0] * heads

    def step(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        index, done = carry
        tile = lax.div(index, heads)
        fields = [tiles_ref[tile, column] for column in range(4)]
        return index + programs, body(_Item(lax.rem(index, heads), *fields), done)

    first = lax.axis_index("program")
    lax.while_loop(lambda carry: carry[0] < items, step, (first, jnp.int32(0)))


def _kernel(
    rows_ref: jax.Ref,
    k_ref: jax.Ref,
    v_ref: jax.Ref,
    table_ref: jax.Ref,
    tiles_ref: jax.Ref,
    live_ref: jax.Ref,
    q_smem: jax.Ref,
    k_smem: jax.Ref,
    v_smem: jax.Ref,
    plain_smem: jax.Ref,
    q_full: jax.Ref,
    k_full: jax.Ref,
    v_full: jax.Ref,
    k_empty: jax.Ref,
    v_empty: jax.Ref,
    turn: jax.Ref,
    *,
    scale: float,
    tuning: Tuning,
) -> None:
    heads, group_size = rows_ref.shape[1], rows_ref.shape[1] // k_ref.shape[1]
    keys, page_size = k_smem.shape[1], k_ref.shape[2]
    group = lax.axis_index("group")
    each_item = functools.partial(_items, tiles_ref, live_ref, heads, tuning.programs)

    @pl.when(group == GROUPS)
    def _copy() -> None:
        plgpu.set_max_registers(40, action="decrease")

        def copy(item: _Item, done: jax.Array) -> jax.Array:
            blocks = item.blocks(GROUPS * ROWS, keys)

            def step(block: jax.Array, _: None) -> None:
                count = done + block
                stage = lax.rem(count, tuning.num_stages)
                for ref, smem, full, empty in (
                    (k_ref, k_smem, k_full, k_empty),
                    (v_ref, v_smem, v_full, v_empty),
                ):
                    reused = functools.partial(plgpu.barrier_wait, empty.at[stage])
                    pl.when(count >= tuning.num_stages)(reused)
                    for i in range(PAGES):
                        entry = lax.min(block * PAGES + i, jnp.int32(table_ref.shape[1] - 1))
                        page = table_ref[item.table_row, entry]
                        plgpu.copy_gmem_to_smem(
                            ref.at[page, lax.div(item.head, group_size)],
                            smem.at[stage, pl.ds(i * page_size, page_size)],
                            full.at[stage],
                        )

            lax.fori_loop(0, blocks, step, None)
            return done + blocks

        each_item(copy)

    @pl.when(group < GROUPS)
    def _compute() -> None:
        plgpu.set_max_registers(232, action="increase")
        wait_for_turn = _ping_pong(turn, tuning.ping_pong)
        ring = _Ring(q_smem.at[group], k_smem, v_smem, k_full, v_full, k_empty, v_empty, tuning.num_stages)

        def compute(item: _Item, done: jax.Array) -> jax.Array:
            first, blocks = group * ROWS, item.blocks(GROUPS * ROWS, keys)
            mine = jnp.where(item.count > first, item.blocks(first + ROWS, keys), 0)
            unmasked = lax.min(lax.div(item.position + first + 1, keys), mine)
            queries = pl.ds(item.start + first, ROWS)
            _load(rows_ref.at[queries, item.head], plain_smem.at[group], q_smem.at[group], q_full.at[group])
            pl.when(group == 1)(wait_for_turn)
            step = functools.partial(
                _attend, ring, wait_for_turn, scale * math.log2(math.e), done, item.position + first
            )
            state = lax.fori_loop(0, unmasked, functools.partial(step, masked=False), _initial(ring.q_smem))
            state = lax.fori_loop(unmasked, mine, functools.partial(step, masked=True), state)
            lax.fori_loop(mine, blocks, lambda block, _: ring.skip(done + block, wait_for_turn), None)
            pl.when(group == 0)(wait_for_turn)
            _store(state, plain_smem.at[group], rows_ref, item, first)
            return done + blocks

        each_item(compute)
        plgpu.wait_smem_to_gmem(0)


def _ping_pong(turn: Any, enabled: bool) -> Callable[[], None]:
    """What a warpgroup calls when the tensor cores pass from one to the other."""

    def wait() -> None:
        plgpu.barrier_arrive(turn)
        plgpu.barrier_wait(turn)

    return wait if enabled else lambda: None


def _load(ref: Any, plain: Any, swizzled: Any, full: Any) -> None:
    """Queries may begin anywhere, but TMA copies to swizzled memory only from multiples of eight rows."""
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    plgpu.copy_gmem_to_smem(ref, plain, full)
    plgpu.barrier_wait(full)
    swizzled[...] = plain[...]
    plgpu.commit_smem()


State = tuple[jax.Array, jax.Array, jax.Array]  # output [ROWS, D], maximum [ROWS], denominator [ROWS]


def _initial(q_smem: jax.Ref) -> State:
    per_row = plgpu.Layout.WGMMA.reduce(1)
    out = plgpu.layout_cast(jnp.zeros(q_smem.shape, jnp.float32), plgpu.Layout.WGMMA)
    maximum = plgpu.layout_cast(jnp.full((ROWS,), LOWEST, jnp.float32), per_row)
    return out, maximum, plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), per_row)


@dataclass(frozen=True)
class _Ring:
    """A warpgroup's queries, and the stages of K and V that pass by."""

    q_smem: jax.Ref
    k_smem: jax.Ref
    v_smem: jax.Ref
    k_full: jax.Ref
    v_full: jax.Ref
    k_empty: jax.Ref
    v_empty: jax.Ref
    num_stages: int

    def skip(self, count: jax.Array, wait_for_turn: Callable[[], None]) -> None:
        """Lets a block go that only the other warpgroup needs."""
        stage = lax.rem(count, self.num_stages)
        for full, empty in ((self.k_full, self.k_empty), (self.v_full, self.v_empty)):
            plgpu.barrier_wait(full.at[stage])
            plgpu.barrier_arrive(empty.at[stage])
            wait_for_turn()


def _attend(
    ring: _Ring,
    wait_for_turn: Callable[[], None],
    scale: float,
    done: jax.Array,
    position: jax.Array,
    block: jax.Array,
    state: State,
    *,
    masked: bool,
) -> State:
    """Adds a block of keys to the softmax; `position` is that of the first query, `scale` in base 2."""
    out, maximum, denominator = state
    stage, keys = lax.rem(done + block, ring.num_stages), ring.k_smem.shape[1]
    plgpu.barrier_wait(ring.k_full.at[stage])

    def multiply_keys(acc: Any) -> jax.Array:
        plgpu.wgmma(acc, ring.q_smem, ring.k_smem.at[stage].T)
        wait_for_turn()
        return acc[...]

    logits = pl.run_scoped(multiply_keys, plgpu.ACC((ROWS, keys), jnp.float32))
    plgpu.barrier_arrive(ring.k_empty.at[stage])
    if masked:
        iota = functools.partial(plgpu.broadcasted_iota, jnp.int32, logits.shape, layout=plgpu.Layout.WGMMA)
        query, key = iota(0), iota(1)
        logits = jnp.where(query + position >= key + block * keys, logits, LOWEST)
    new_maximum = jnp.maximum(maximum, logits.max(axis=1) * scale)
    decay = jnp.exp2(maximum - new_maximum)
    weights = jnp.exp2(logits * scale - lax.broadcast_in_dim(new_maximum, logits.shape, [0]))
    denominator = denominator * decay + weights.sum(axis=1)
    out = out * lax.broadcast_in_dim(decay, out.shape, [0])
    rounded = weights.astype(ring.v_smem.dtype)
    plgpu.barrier_wait(ring.v_full.at[stage])
    wait_for_turn()

    def multiply_values(acc: Any) -> None:
        plgpu.wgmma(acc, rounded, ring.v_smem.at[stage])

    out = pl.run_state(multiply_values)(plgpu.ACC.init(out))
    plgpu.barrier_arrive(ring.v_empty.at[stage])
    return out, new_maximum, denominator


def _store(state: State, smem: jax.Ref, out_ref: jax.Ref, item: _Item, first: jax.Array) -> None:
    """Writes the tile's rows and no others: as many powers of two of them as their number has ones."""
    out, _, denominator = state
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    smem[...] = (out / lax.broadcast_in_dim(denominator, out.shape, [0])).astype(smem.dtype)
    plgpu.commit_smem()
    rows = lax.clamp(jnp.int32(0), item.count - first, jnp.int32(ROWS))
    size = ROWS
    while size:
        begin = rows & ~(2 * size - 1)

        @pl.when(rows & size != 0)
        def _write(size: int = size, begin: jax.Array = begin) -> None:
            target = out_ref.at[pl.ds(item.start + first + begin, size), item.head]
            plgpu.copy_smem_to_gmem(smem.at[pl.ds(begin, size)], target)

        size //= 2
