"""A product of one row with the residual addition and the RMSNorm before it, in Pallas (Triton backend).

Each program reads the row beside its own tiles of the weight, a block ahead in registers, and adds and weighs
it on the way; the scale, known at the end, is that of the sums. So the weight streams from the start. All
programs read all of the row from the second-level cache, which costs less than a kernel of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from lmdeploy_jax.pallas_kernels.blocks import dot
from lmdeploy_jax.pallas_kernels.launch import launch
from lmdeploy_jax.pallas_kernels.skinny_gemm.pallas import WeightTile, gated, launch_of
from lmdeploy_jax.pallas_kernels.skinny_gemm.tiling import Tiling

Row = tuple[jax.Array, ...]  # blocks [1, block_in] of the residual stream, the norm's weight, and parts


def norm_skinny_gemm(
    x: Float[Array, "1 K"],
    parts: Float[Array, "S 1 K"],
    norm: Float[Array, "K"],
    weight: Float[Array, "halves N K"],
    tiling: Tiling,
    activation: Callable[[jax.Array], jax.Array] | None,
    *,
    eps: float,
    offset: float,
    out_dtype: DTypeLike,
    interpret: bool,
) -> tuple[Float[Array, "1 K"], Float[Array, "1 N"]]:
    """See `lmdeploy_jax.pallas_kernels.skinny_gemm`; one or two halves."""
    outputs = weight.shape[1]
    how = launch_of("norm_skinny_gemm", outputs, tiling)
    # Not aliased to x: programs that start late still read x as it was.
    out = [jax.ShapeDtypeStruct(x.shape, x.dtype), jax.ShapeDtypeStruct((1, outputs), out_dtype)]
    kernel = functools.partial(_kernel, tiling=tiling, activation=activation, eps=eps, offset=offset)
    added, product = launch(kernel, how, out, x, parts, norm, weight, interpret=interpret)
    return added, product


def _kernel(
    x_ref: jax.Ref,
    parts_ref: jax.Ref,
    norm_ref: jax.Ref,
    weight_ref: jax.Ref,
    added_ref: jax.Ref,
    out_ref: jax.Ref,
    *,
    tiling: Tiling,
    activation: Callable[[jax.Array], jax.Array] | None,
    eps: float,
    offset: float,
) -> None:
    tile = WeightTile(1, out_ref.shape[1], tiling)
    size, halves = x_ref.shape[1], weight_ref.shape[0]
    steps = size // tiling.block_in
    first = jnp.broadcast_to(pl.program_id(0) == 0, (1, tiling.block_in))

    def columns(index: jax.Array) -> jax.Array:
        return index * tiling.block_in + jnp.arange(tiling.block_in, dtype=jnp.int32)[None, :]

    def read(index: jax.Array) -> Row:
        column = columns(index)
        parts = [plt.load(parts_ref.at[part, 0, column]) for part in range(parts_ref.shape[0])]
        return plt.load(x_ref.at[0, column]), plt.load(norm_ref.at[column]), *parts

    def step(index: jax.Array, state: tuple[list[jax.Array], jax.Array, Row]) -> tuple:
        totals, squares, (x, norm, *parts) = state
        ahead = read(jnp.minimum(index + 1, steps - 1))
        added = sum((part.astype(jnp.float32) for part in parts), x.astype(jnp.float32)).astype(x.dtype)
        plt.store(added_ref.at[0, columns(index)], added, mask=first)
        wide = added.astype(jnp.float32)
        weighed = (wide * (norm.astype(jnp.float32) + offset)).astype(x.dtype)
        column = jnp.broadcast_to(weighed, (tile.token.size, tiling.block_in)).T
        inner = index * tiling.block_in
        products = [dot(tile.read(weight_ref, inner, half), column) for half in range(halves)]
        totals = [total + product for total, product in zip(totals, products, strict=True)]
        return totals, squares + wide * wide, ahead

    zeros = jnp.zeros((1, tiling.block_in), jnp.float32)
    state = ([tile.zeros()] * halves, zeros, read(jnp.int32(0)))
    totals, squares, _ = lax.fori_loop(0, steps, step, state)
    scale = lax.rsqrt(jnp.sum(squares, axis=1, keepdims=True) * (1.0 / size) + eps)
    totals = [total * scale for total in totals]
    out = totals[0] if activation is None else gated(totals[0], totals[1], activation, out_ref.dtype)
    plt.store(out_ref.at[tile.place], out.astype(out_ref.dtype), mask=tile.mask)
