"""Prepared blocks of recurrences over a matrix a head and sequence, one behind the other, in Pallas (Triton
backend).

A program has some columns of one head's state, which depend on no others, and keeps them while blocks of one
sequence follow each other. XLA's loop takes states through memory, in a dozen kernels a block.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float32, Int32

from lmdeploy_jax.pallas_kernels.launch import Launch, launch
from lmdeploy_jax.pallas_kernels.spans import NOWHERE
from lmdeploy_jax.pallas_kernels.token_blocks import Block, Prepared

COLUMNS, WARPS = 32, 8  # of a program
LEAST = 16  # rows and columns of a tensor core's product
Carry = tuple[Array, Array]  # outputs [T + a block, H, R, V] and states [slots, N, D, V], f32
State = tuple[Int32[Array, ""], Float32[Array, "D columns"]]


def advance_blocks(blocks: Block, ready: Prepared, carry: Carry, *, interpret: bool) -> Carry:
    """What `Prepared.advance` does for each of the blocks, in order; the carry is written in place."""
    heads, per_key = ready.kept.shape[1:]
    values = carry[0].shape[-1]
    columns = min(COLUMNS, max(pl.next_power_of_2(values), LEAST))
    grid = (pl.cdiv(values, columns), heads * per_key)
    how = Launch("advance_blocks", grid, num_warps=WARPS, num_stages=1, aliases={0: 0, 1: 1})
    where = (blocks.start, blocks.count, blocks.slot, blocks.fresh.astype(jnp.int32))
    out = [jax.ShapeDtypeStruct(each.shape, each.dtype) for each in carry]
    kernel = functools.partial(_kernel, columns=columns, interpret=interpret)
    outputs, states = launch(kernel, how, out, *carry, *where, *ready, interpret=interpret)
    return outputs, states


def _kernel(
    _out_in: jax.Ref,
    _states_in: jax.Ref,
    start_ref: jax.Ref,
    count_ref: jax.Ref,
    slot_ref: jax.Ref,
    fresh_ref: jax.Ref,
    q_ref: jax.Ref,
    k_ref: jax.Ref,
    added_ref: jax.Ref,
    removed_ref: jax.Ref | None,
    weights_ref: jax.Ref,
    kept_ref: jax.Ref,
    out_ref: jax.Ref,
    states_ref: jax.Ref,
    *,
    columns: int,
    interpret: bool,
) -> None:
    count, _, per_key, size, keys = q_ref.shape
    head = pl.program_id(1)
    at = (head // per_key, head % per_key)
    column = pl.program_id(0) * columns + jnp.arange(columns, dtype=jnp.int32)
    token = jnp.arange(size, dtype=jnp.int32)
    number = jnp.arange(max(pl.next_power_of_2(keys), LEAST), dtype=jnp.int32)
    inside, within = column < out_ref.shape[-1], number < keys
    dot = functools.partial(_dot, interpret=interpret)

    def step(index: jax.Array, before: State) -> State:
        slot, state = slot_ref[index], before[1]
        other, fresh = slot != before[0], fresh_ref[index] != 0
        place = states_ref.at[slot, head, number[:, None], column[None, :]]
        mask = within[:, None] & inside[None, :]
        held = plt.load(place, mask=mask & other & ~fresh, other=0.0)
        state = jnp.where(other | fresh, held, state)

        read = functools.partial(_read, (index, *at))
        added = read(added_ref, token[:, None], column[None, :], inside[None, :])
        if removed_ref is not None:
            added -= dot(read(removed_ref, token[:, None], number[None, :], within[None, :]), state)
        q = read(q_ref, token[:, None], number[None, :], within[None, :])
        out = dot(q, state) + dot(plt.load(weights_ref.at[index, *at]), added)
        seen = (token < count_ref[index])[:, None] & inside[None, :]
        row = start_ref[index] + token
        plt.store(out_ref.at[row[:, None], *at, column[None, :]], out, mask=seen)

        k = read(k_ref, number[:, None], token[None, :], within[:, None], turned=True)
        state = kept_ref[index, *at] * state + dot(k, added)
        last = (index == count - 1) | (slot_ref[jnp.minimum(index + 1, count - 1)] != slot)
        plt.store(place, state, mask=mask & last)
        return slot, state

    lax.fori_loop(0, count, step, (jnp.int32(NOWHERE), jnp.zeros((number.size, columns), jnp.float32)))


def _read(
    first: tuple[Array, ...], ref: jax.Ref, rows: Array, columns: Array, mask: Array, *, turned: bool = False
) -> Float32[Array, "rows columns"]:
    """A matrix of an array; `turned`: its transpose."""
    place = ref.at[(*first, columns, rows)] if turned else ref.at[(*first, rows, columns)]
    shape = jnp.broadcast_shapes(rows.shape, columns.shape)
    return plt.load(place, mask=jnp.broadcast_to(mask, shape), other=0.0)


def _dot(a: Float32[Array, "M K"], b: Float32[Array, "K N"], *, interpret: bool) -> Float32[Array, "M N"]:
    """On tensor cores: three products of TF32 are as exact as one of f32. CPUs have no such product."""
    three = lax.DotAlgorithmPreset.TF32_TF32_F32_X3
    return plt.dot(a, b, precision=lax.Precision.HIGHEST if interpret else three)
