"""One token of recurrences over a matrix a head and sequence, in Pallas (Triton backend).

A program has some columns of one head's state, which depend on no others: it reads them once and writes them
once, in place. XLA takes states out of their slots and puts them back, which is two more copies of them.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Bool, Float, Float32

from lmdeploy_jax.pallas_kernels.launch import Launch, launch
from lmdeploy_jax.pallas_kernels.spans import NOWHERE, Spans

COLUMNS = 32  # of a program: with 128 rows as many numbers as the registers of four warps hold


def recurrent_step(
    q: Float[Array, "S H D"],
    k: Float[Array, "S H D"],
    v: Float[Array, "S H R V"],
    log_decay: Float32[Array, "S H R"],
    beta: Float32[Array, "S H R"] | None,
    states: Float32[Array, "slots N D V"],
    spans: Spans,
    wanted: Bool[Array, "S"] | None,
    *,
    interpret: bool,
) -> tuple[Float32[Array, "S H R V"], Float32[Array, "slots N D V"]]:
    """`S <- exp(log_decay) S`, `S <- S + k d'`, and the output `S'q`; d is v, or with a beta
    `beta (v - S'k)`. The states of those that are not `wanted` stay as they are, and their outputs are 0.
    """
    sequences, heads, per_key, values = v.shape
    columns = min(COLUMNS, pl.next_power_of_2(values))
    grid = (pl.cdiv(values, columns), heads * per_key, sequences)
    how = Launch("recurrent_step", grid, num_warps=4, num_stages=1, aliases={0: 0})
    out = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (states.shape, v.shape)]
    arrays = (states, spans.rows(wanted), spans.fresh.astype(jnp.int32), q, k, v, log_decay, beta)
    kernel = functools.partial(_kernel, columns=columns)
    states, values = launch(kernel, how, out, *arrays, interpret=interpret)
    return values, states


def _kernel(
    _states_in: jax.Ref,
    rows_ref: jax.Ref,
    fresh_ref: jax.Ref,
    q_ref: jax.Ref,
    k_ref: jax.Ref,
    v_ref: jax.Ref,
    decay_ref: jax.Ref,
    beta_ref: jax.Ref | None,
    states_ref: jax.Ref,
    out_ref: jax.Ref,
    *,
    columns: int,
) -> None:
    block, head, sequence = (pl.program_id(axis) for axis in range(3))
    per_key, size, width = v_ref.shape[2], q_ref.shape[2], v_ref.shape[3]
    at = (sequence, head // per_key, head % per_key)
    column = block * columns + jnp.arange(columns, dtype=jnp.int32)
    number, inside = jnp.arange(pl.next_power_of_2(size), dtype=jnp.int32), column < width
    row, within = rows_ref[sequence], number < size
    mask = within[:, None] & inside[None, :]

    @pl.when(row != NOWHERE)
    def _advance() -> None:
        q, k = (
            plt.load(ref.at[(*at[:2], number)], mask=within, other=0).astype(jnp.float32)
            for ref in (q_ref, k_ref)
        )
        added = plt.load(v_ref.at[(*at, column)], mask=inside, other=0).astype(jnp.float32)
        place = states_ref.at[row, head, number[:, None], column[None, :]]
        state = plt.load(place, mask=mask & (fresh_ref[sequence] == 0), other=0.0) * jnp.exp(decay_ref[at])
        if beta_ref is not None:
            added = beta_ref[at] * (added - jnp.sum(k[:, None] * state, axis=0))
        state += k[:, None] * added[None, :]
        plt.store(place, state, mask=mask)
        plt.store(out_ref.at[(*at, column)], jnp.sum(q[:, None] * state, axis=0), mask=inside)

    @pl.when(row == NOWHERE)
    def _pad() -> None:
        plt.store(out_ref.at[(*at, column)], jnp.zeros(columns, jnp.float32), mask=inside)
