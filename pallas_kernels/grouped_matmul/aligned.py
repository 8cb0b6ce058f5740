"""Tokens copied to the rows that their experts read, and experts' rows added up by token (Triton backend).

Products whose tiles TMA moves read runs of rows. Copying them there costs less than it may seem: a token is
read once and written as often as it has choices, which at 8,192 tokens of Qwen3-30B-A3B is 34 + 268 MB, 70 us
of an H200 beside 520 of arithmetic. The way back reads as much as a norm that adds up a part for each choice
would, and writes a token once, while the product before it stores whole tiles instead of rows here and there.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Float32, Int32

from lmdeploy_jax.pallas_kernels.launch import Launch, launch

BLOCK = 2048  # columns of a program


def spread(
    x: Float[Array, "T K"], place: Int32[Array, "M"], rows: int, *, interpret: bool
) -> Float[Array, "R K"]:
    """Token m // (M // T) in row `place[m]`, for each m; other rows hold anything."""
    tokens, columns = x.shape
    kernel = functools.partial(_spread, choices=place.shape[0] // tokens)
    out = jax.ShapeDtypeStruct((rows, columns), x.dtype)
    return launch(kernel, _launch("spread_rows", tokens, columns), out, x, place, interpret=interpret)


def combine(
    rows: Float[Array, "R N"],
    place: Int32[Array, "M"],
    scales: Float32[Array, "T k"],
    *,
    interpret: bool,
) -> Float[Array, "T N"]:
    """The sum in f32 of a token's rows times their scales; choice c of token t has row `place[t k + c]`."""
    tokens, columns = scales.shape[0], rows.shape[1]
    out = jax.ShapeDtypeStruct((tokens, columns), rows.dtype)
    how = _launch("combine_rows", tokens, columns)
    return launch(_combine, how, out, rows, place, scales, interpret=interpret)


def _launch(name: str, tokens: int, columns: int) -> Launch:
    return Launch(name, (tokens, pl.cdiv(columns, BLOCK)), num_warps=4, num_stages=1)


def _columns(columns: int) -> tuple[jax.Array, jax.Array]:
    """Those of this program, and which of them there are."""
    size = min(BLOCK, pl.next_power_of_2(columns))
    column = pl.program_id(1) * size + jnp.arange(size, dtype=jnp.int32)
    return column, column < columns


def _spread(x_ref: jax.Ref, place_ref: jax.Ref, out_ref: jax.Ref, *, choices: int) -> None:
    token, (column, mask) = pl.program_id(0), _columns(x_ref.shape[1])
    values = plt.load(x_ref.at[token, column], mask=mask, other=0)
    for choice in range(choices):
        plt.store(out_ref.at[place_ref[token * choices + choice], column], values, mask=mask)


def _combine(rows_ref: jax.Ref, place_ref: jax.Ref, scales_ref: jax.Ref, out_ref: jax.Ref) -> None:
    token, choices = pl.program_id(0), scales_ref.shape[1]
    column, mask = _columns(out_ref.shape[1])
    total = jnp.zeros(column.shape, jnp.float32)
    for choice in range(choices):
        at = rows_ref.at[place_ref[token * choices + choice], column]
        total += plt.load(at, mask=mask, other=0).astype(jnp.float32) * scales_ref[token, choice]
    plt.store(out_ref.at[token, column], total.astype(out_ref.dtype), mask=mask)
