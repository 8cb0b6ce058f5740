"""Encoder attention in Mosaic GPU (Hopper), in the manner of FlashAttention-3 (Shah et al., 2024).

A work item is a head of a sequence with as many queries as its computing warpgroups take together, 64 each.
One more warpgroup copies them, and keys and values block by block, through TMA into rings of stages, items
ahead. Programs are as many as cores; items with the few queries behind a sequence's whole blocks come last.
TMA reads zeros beyond a sequence's end and writes nothing there. Heads of 64 spend as long at their softmax
as at their products, so that three warpgroups side by side measured faster than two that take turns.
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
from jaxtyping import Array, Float

ROWS = 64  # queries of a warpgroup
LOWEST = -1e30
SWIZZLED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
HELD = 2  # items whose queries are in shared memory
Scratch = Any  # shared memory with a layout of its own, or barriers: Pallas has no public name for such refs
State = tuple[jax.Array, jax.Array, jax.Array]  # output [ROWS, D], maximum [ROWS], denominator [ROWS]


@dataclass(frozen=True)
class Tuning:
    """Warpgroups that compute; keys of a block; blocks in flight; programs."""

    groups: int = 3
    keys: int = 128
    num_stages: int = 4
    programs: int = 132

    @property
    def registers(self) -> tuple[int, int]:
        """Of the warpgroup that copies and of those that compute."""
        return {2: (40, 232), 3: (32, 160), 4: (24, 120)}[self.groups]


def encoder_attention(
    qkv: Float[Array, "B N 3 H D"], count: int, tuning: Tuning = Tuning()
) -> Float[Array, "B N H D"]:
    """Of sequences of `count` patches; what stands behind them, up to N, a multiple of 8, is padding."""
    batch, rows, _, heads, head_dim = qkv.shape
    work = _Work(batch, heads, count, tuning)
    stages, keys, groups = tuning.num_stages, tuning.keys, tuning.groups
    body = functools.partial(_kernel, work=work, scale=head_dim**-0.5 * math.log2(math.e))
    body.__name__ = "encoder_attention"  # type: ignore[attr-defined]  # what profiles call it
    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((batch, rows, heads, head_dim), qkv.dtype),
        grid=(tuning.programs,),
        grid_names=("program",),
        num_threads=groups + 1,
        thread_name="group",
        scratch_types=[
            plgpu.SMEM((HELD, groups, ROWS, head_dim), qkv.dtype, transforms=SWIZZLED),
            plgpu.SMEM((stages, keys, head_dim), qkv.dtype, transforms=SWIZZLED),
            plgpu.SMEM((stages, keys, head_dim), qkv.dtype, transforms=SWIZZLED),
            plgpu.SMEM((groups, ROWS, head_dim), qkv.dtype, transforms=SWIZZLED),
            plgpu.Barrier(num_arrivals=groups, num_barriers=HELD),
            *[plgpu.Barrier(num_barriers=stages)] * 2,
            plgpu.Barrier(num_arrivals=groups, num_barriers=HELD),
            *[plgpu.Barrier(num_arrivals=groups, num_barriers=stages)] * 2,
        ],
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup
        ),
    )
    return kernel(qkv.reshape(batch, rows, 3 * heads, head_dim))


@dataclass(frozen=True)
class _Item:
    """Some queries of one head; `number` among the program's, `first` the first query."""

    number: jax.Array
    sequence: jax.Array
    head: jax.Array
    first: jax.Array


@dataclass(frozen=True)
class _Keys:
    """A block of keys: its number, how many are read, and how many there are of them."""

    block: jax.Array
    size: int
    valid: int


@dataclass(frozen=True)
class _Work:
    """The items of all programs."""

    batch: int
    heads: int
    count: int
    tuning: Tuning

    @property
    def blocks(self) -> int:
        """Of keys, one with few included."""
        return pl.cdiv(self.count, self.tuning.keys)

    @property
    def rest(self) -> int:
        """Keys behind the whole blocks."""
        return self.count % self.tuning.keys

    def over_keys(self, step: Callable[[_Keys, Any], Any], state: Any) -> Any:
        """`step(keys, state)` for each block of keys; the last one has as many as a product takes, 64s."""
        size, whole = self.tuning.keys, self.count // self.tuning.keys
        state = lax.fori_loop(0, whole, lambda block, carry: step(_Keys(block, size, size), carry), state)
        if not self.rest:
            return state
        return step(_Keys(jnp.int32(whole), -(-self.rest // 64) * 64, self.rest), state)

    def each(self, body: Callable[[_Item], None]) -> None:
        """Runs it for this program's items: whole blocks of queries, head by head, before the rest."""
        step, programs = self.tuning.groups * ROWS, self.tuning.programs
        pairs, whole = self.batch * self.heads, self.count // step
        items, program = pairs * pl.cdiv(self.count, step), lax.axis_index("program")

        def one(number: jax.Array, _: None) -> None:
            index = program + number * programs
            rest = index - pairs * whole
            pair = jnp.where(rest >= 0, rest, lax.div(index, jnp.int32(max(whole, 1))))
            block = jnp.where(rest >= 0, whole, lax.rem(index, jnp.int32(max(whole, 1))))
            body(_Item(number, lax.div(pair, self.heads), lax.rem(pair, self.heads), block * step))

        lax.fori_loop(0, lax.div(items - program + programs - 1, programs), one, None)


def _kernel(
    qkv_ref: jax.Ref,
    out_ref: jax.Ref,
    q_smem: Scratch,
    k_smem: Scratch,
    v_smem: Scratch,
    out_smem: Scratch,
    q_full: Scratch,
    k_full: Scratch,
    v_full: Scratch,
    q_empty: Scratch,
    k_empty: Scratch,
    v_empty: Scratch,
    *,
    work: _Work,
    scale: float,
) -> None:
    group, tuning = lax.axis_index("group"), work.tuning
    copying, computing = tuning.registers
    blocks, stages = work.blocks, tuning.num_stages

    @pl.when(group == tuning.groups)
    def _copy() -> None:
        plgpu.set_max_registers(copying, action="decrease")

        def copy(item: _Item) -> None:
            slot = lax.rem(item.number, HELD)
            pl.when(item.number >= HELD)(lambda: plgpu.barrier_wait(q_empty.at[slot]))
            for i in range(tuning.groups):
                rows = pl.ds(item.first + i * ROWS, ROWS)
                source = qkv_ref.at[item.sequence, rows, item.head]
                plgpu.copy_gmem_to_smem(source, q_smem.at[slot, i], q_full.at[slot])

            def step(keys: _Keys, _: None) -> None:
                number = item.number * blocks + keys.block
                stage, rows = lax.rem(number, stages), pl.ds(keys.block * tuning.keys, keys.size)
                for part, smem, full, empty in ((1, k_smem, k_full, k_empty), (2, v_smem, v_full, v_empty)):
                    reused = functools.partial(plgpu.barrier_wait, empty.at[stage])
                    pl.when(number >= stages)(reused)
                    source = qkv_ref.at[item.sequence, rows, part * work.heads + item.head]
                    plgpu.copy_gmem_to_smem(source, smem.at[stage, pl.ds(0, keys.size)], full.at[stage])

            work.over_keys(step, None)

        work.each(copy)

    @pl.when(group < tuning.groups)
    def _compute() -> None:
        plgpu.set_max_registers(computing, action="increase")
        ring = _Ring(k_smem, v_smem, k_full, v_full, k_empty, v_empty, stages, scale)

        def compute(item: _Item) -> None:
            slot, first = lax.rem(item.number, HELD), item.first + group * ROWS
            plgpu.barrier_wait(q_full.at[slot])
            done = item.number * blocks

            @pl.when(first < work.count)
            def _some() -> None:
                q = q_smem.at[slot, group]
                state = work.over_keys(functools.partial(_attend, ring, q, done), _initial(q))
                plgpu.barrier_arrive(q_empty.at[slot])
                _store(state, out_smem.at[group], out_ref.at[item.sequence, pl.ds(first, ROWS), item.head])

            @pl.when(first >= work.count)
            def _none() -> None:
                lax.fori_loop(done, done + blocks, lambda number, _: ring.skip(number), None)
                plgpu.barrier_arrive(q_empty.at[slot])

        work.each(compute)
        plgpu.wait_smem_to_gmem(0)


def _initial(q_smem: Scratch) -> State:
    per_row = plgpu.Layout.WGMMA.reduce(1)
    out = plgpu.layout_cast(jnp.zeros(q_smem.shape, jnp.float32), plgpu.Layout.WGMMA)
    maximum = plgpu.layout_cast(jnp.full((ROWS,), LOWEST, jnp.float32), per_row)
    return out, maximum, plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), per_row)


@dataclass(frozen=True)
class _Ring:
    """The stages of K and V that pass by."""

    k_smem: Scratch
    v_smem: Scratch
    k_full: Scratch
    v_full: Scratch
    k_empty: Scratch
    v_empty: Scratch
    num_stages: int
    scale: float

    def skip(self, number: jax.Array) -> None:
        """Lets a block go that only other warpgroups need."""
        stage = lax.rem(number, self.num_stages)
        for full, empty in ((self.k_full, self.k_empty), (self.v_full, self.v_empty)):
            plgpu.barrier_wait(full.at[stage])
            plgpu.barrier_arrive(empty.at[stage])


def _attend(ring: _Ring, q_smem: Scratch, done: jax.Array, keys: _Keys, state: State) -> State:
    """Adds a block of keys to the softmax, whose maximum is of logits that are scaled, in base 2."""
    out, maximum, denominator = state
    stage, some = lax.rem(done + keys.block, ring.num_stages), pl.ds(0, keys.size)
    plgpu.barrier_wait(ring.k_full.at[stage])

    def multiply_keys(acc: Scratch) -> jax.Array:
        plgpu.wgmma(acc, q_smem, ring.k_smem.at[stage, some].T)
        return acc[...]

    logits = pl.run_scoped(multiply_keys, plgpu.ACC((ROWS, keys.size), jnp.float32))
    plgpu.barrier_arrive(ring.k_empty.at[stage])
    if keys.valid < keys.size:
        key = plgpu.broadcasted_iota(jnp.int32, logits.shape, 1, layout=plgpu.Layout.WGMMA)
        logits = jnp.where(key < keys.valid, logits, LOWEST)
    new_maximum = jnp.maximum(maximum, logits.max(axis=1) * ring.scale)
    decay = jnp.exp2(maximum - new_maximum)
    weights = jnp.exp2(logits * ring.scale - lax.broadcast_in_dim(new_maximum, logits.shape, [0]))
    denominator = denominator * decay + weights.sum(axis=1)
    out = out * lax.broadcast_in_dim(decay, out.shape, [0])
    rounded = weights.astype(ring.v_smem.dtype)
    plgpu.barrier_wait(ring.v_full.at[stage])

    def multiply_values(acc: Scratch) -> None:
        plgpu.wgmma(acc, rounded, ring.v_smem.at[stage, some])

    out = pl.run_state(multiply_values)(plgpu.ACC.init(out))
    plgpu.barrier_arrive(ring.v_empty.at[stage])
    return out, new_maximum, denominator


def _store(state: State, smem: Scratch, target: Any) -> None:
    out, _, denominator = state
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    smem[...] = (out / lax.broadcast_in_dim(denominator, out.shape, [0])).astype(smem.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(smem, target)
