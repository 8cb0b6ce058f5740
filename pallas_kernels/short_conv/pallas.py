"""The short convolution in Pallas (Triton backend): a token at once, its window moved on in place."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Float32

from lmdeploy_jax.pallas_kernels.launch import Launch, launch
from lmdeploy_jax.pallas_kernels.spans import NOWHERE, Spans

COLUMNS = 256  # of a program, two a thread


def step(
    x: Float[Array, "S H C"],
    weight: Float[Array, "H C K"],
    states: Float[Array, "slots H L C"],
    spans: Spans,
    *,
    interpret: bool,
) -> tuple[Float32[Array, "S H C"], Float[Array, "slots H L C"]]:
    """As `xla.step`; the outputs of rows without a token are 0."""
    sequences, heads, channels = x.shape
    columns = min(COLUMNS, pl.next_power_of_2(channels))
    grid = (pl.cdiv(channels, columns), heads, sequences)
    how = Launch("short_conv", grid, num_warps=4, num_stages=1, aliases={0: 0})
    out = [jax.ShapeDtypeStruct(states.shape, states.dtype), jax.ShapeDtypeStruct(x.shape, jnp.float32)]
    arrays = (states, spans.rows(), spans.fresh.astype(jnp.int32), x, weight)
    kernel = functools.partial(_kernel, columns=columns)
    states, values = launch(kernel, how, out, *arrays, interpret=interpret)
    return values, states


def _kernel(
    _states_in: jax.Ref,
    rows_ref: jax.Ref,
    fresh_ref: jax.Ref,
    x_ref: jax.Ref,
    weight_ref: jax.Ref,
    states_ref: jax.Ref,
    out_ref: jax.Ref,
    *,
    columns: int,
) -> None:
    block, head, sequence = (pl.program_id(axis) for axis in range(3))
    column = block * columns + jnp.arange(columns, dtype=jnp.int32)
    inside, row = column < x_ref.shape[2], rows_ref[sequence]
    kept = states_ref.shape[2]

    @pl.when(row != NOWHERE)
    def _advance() -> None:
        goes_on = inside & (fresh_ref[sequence] == 0)
        window = [plt.load(states_ref.at[row, head, i, column], mask=goes_on, other=0) for i in range(kept)]
        new = plt.load(x_ref.at[sequence, head, column], mask=inside, other=0)
        window.append(new.astype(states_ref.dtype))
        total = jnp.zeros(columns, jnp.float32)
        for i, values in enumerate(window):
            tap = plt.load(weight_ref.at[head, column, i], mask=inside, other=0)
            total += values.astype(jnp.float32) * tap.astype(jnp.float32)
        plt.store(out_ref.at[sequence, head, column], total, mask=inside)
        for i, values in enumerate(window[1:]):
            plt.store(states_ref.at[row, head, i, column], values, mask=inside)

    @pl.when(row == NOWHERE)
    def _pad() -> None:
        zeros = jnp.zeros(columns, jnp.float32)
        plt.store(out_ref.at[sequence, head, column], zeros, mask=inside)
