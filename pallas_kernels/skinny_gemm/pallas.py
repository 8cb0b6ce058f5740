"""Skinny products in Pallas (Triton backend): tiles of the weight stream by.

A tile is [block_out, block_in] of the weight, the tensor cores' left operand; all rows of x, padded to a
power of two, are the right one, so that few rows do not waste the 64 rows of a Hopper tensor-core product.
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
from jaxtyping import Array, Float, Float32, Int32, Shaped

from lmdeploy_jax.pallas_kernels.blocks import dot
from lmdeploy_jax.pallas_kernels.launch import Launch, launch
from lmdeploy_jax.pallas_kernels.skinny_gemm.tiling import Tiling


def skinny_gemm(
    x: Float[Array, "T K"],
    weight: Float[Array, "N K"],
    bias: Float[Array, "N"] | None,
    tiling: Tiling,
    out_dtype: DTypeLike,
    *,
    interpret: bool,
) -> Float[Array, "{tiling.splits} T N"]:
    """See `lmdeploy_jax.pallas_kernels.skinny_gemm`."""
    (tokens, _), outputs = x.shape, weight.shape[0]
    how = launch_of("skinny_gemm", outputs, tiling)
    out = jax.ShapeDtypeStruct((tiling.splits, tokens, outputs), out_dtype)
    return launch(functools.partial(_kernel, tiling=tiling), how, out, x, weight, bias, interpret=interpret)


def gated_skinny_gemm(
    x: Float[Array, "T K"],
    weight: Float[Array, "2 N K"],
    tiling: Tiling,
    activation: Callable[[jax.Array], jax.Array],
    *,
    interpret: bool,
) -> Float[Array, "T N"]:
    """See `lmdeploy_jax.pallas_kernels.skinny_gemm`."""
    (tokens, _), outputs = x.shape, weight.shape[1]
    how = launch_of("gated_skinny_gemm", outputs, tiling)
    kernel = functools.partial(_gated_kernel, tiling=tiling, activation=activation)
    return launch(
        kernel, how, jax.ShapeDtypeStruct((tokens, outputs), x.dtype), x, weight, interpret=interpret
    )


def launch_of(name: str, outputs: int, tiling: Tiling) -> Launch:
    """A program a tile of outputs and part."""
    grid = (pl.cdiv(outputs, tiling.block_out), tiling.splits)
    return Launch(name, grid, tiling.num_warps, tiling.num_stages)


def _kernel(
    x_ref: jax.Ref, weight_ref: jax.Ref, bias_ref: jax.Ref | None, out_ref: jax.Ref, *, tiling: Tiling
) -> None:
    split, tile = pl.program_id(1), WeightTile(x_ref.shape[0], out_ref.shape[2], tiling)
    share = x_ref.shape[1] // tiling.splits

    def step(index: jax.Array, total: jax.Array) -> jax.Array:
        inner = split * share + index * tiling.block_in
        return total + dot(tile.read(weight_ref, inner), tile.x(x_ref, inner).T)

    total = lax.fori_loop(0, share // tiling.block_in, step, tile.zeros())
    if bias_ref is not None:
        bias = plt.load(bias_ref.at[tile.out], mask=(tile.out < tile.outputs) & (split == 0), other=0)
        total += bias.astype(jnp.float32)[:, None]
    plt.store(out_ref.at[split, *tile.place], total.astype(out_ref.dtype), mask=tile.mask)


def _gated_kernel(
    x_ref: jax.Ref,
    weight_ref: jax.Ref,
    out_ref: jax.Ref,
    *,
    tiling: Tiling,
    activation: Callable[[jax.Array], jax.Array],
) -> None:
    tile = WeightTile(x_ref.shape[0], out_ref.shape[1], tiling)

    def step(index: jax.Array, totals: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        inner = index * tiling.block_in
        x = tile.x(x_ref, inner).T
        gate, up = (dot(tile.read(weight_ref, inner, half), x) for half in range(2))
        return totals[0] + gate, totals[1] + up

    steps = x_ref.shape[1] // tiling.block_in
    gate, up = lax.fori_loop(0, steps, step, (tile.zeros(), tile.zeros()))
    plt.store(out_ref.at[tile.place], gated(gate, up, activation, out_ref.dtype), mask=tile.mask)


def gated(
    gate: Float32[Array, "*tile"],
    up: Float32[Array, "*tile"],
    activation: Callable[[jax.Array], jax.Array],
    dtype: jnp.dtype,
) -> Float[Array, "*tile"]:
    """activation(gate) * up, rounded where the separate operations round."""
    gate, up = (half.astype(dtype).astype(jnp.float32) for half in (gate, up))
    return (activation(gate).astype(dtype).astype(jnp.float32) * up).astype(dtype)


class WeightTile:
    """The outputs and tokens of this program."""

    def __init__(self, tokens: int, outputs: int, tiling: Tiling) -> None:
        self.tokens, self.outputs, self.block_in = tokens, outputs, tiling.block_in
        rows = max(tiling.min_rows, pl.next_power_of_2(self.tokens))
        self.token = jnp.arange(rows, dtype=jnp.int32)
        self.out = pl.program_id(0) * tiling.block_out + jnp.arange(tiling.block_out, dtype=jnp.int32)
        self.in_bounds = outputs % tiling.block_out == 0
        self.mask = (self.out < outputs)[:, None] & (self.token < self.tokens)[None, :]

    @property
    def place(self) -> tuple[jax.Array, jax.Array]:
        """In [T, N]."""
        return self.token[None, :], self.out[:, None]

    def zeros(self) -> Float32[Array, "out rows"]:
        return jnp.zeros(self.mask.shape, jnp.float32)

    def x(self, ref: jax.Ref, inner: Int32[Array, ""]) -> Shaped[Array, "rows {self.block_in}"]:
        """x's elements from `inner` on."""
        column = inner + jnp.arange(self.block_in, dtype=jnp.int32)
        at = ref.at[self.token[:, None], column[None, :]]
        if self.tokens == self.token.size:
            return plt.load(at)
        inside = jnp.broadcast_to((self.token < self.tokens)[:, None], (self.token.size, self.block_in))
        return plt.load(at, mask=inside, other=zero_of(ref))

    def read(self, ref: jax.Ref, inner: Int32[Array, ""], *half: int) -> Shaped[Array, "out {self.block_in}"]:
        """The weight's elements from `inner` on."""
        column = inner + jnp.arange(self.block_in, dtype=jnp.int32)
        at = ref.at[(*half, self.out[:, None], column[None, :])]
        if self.in_bounds:
            return plt.load(at)
        inside = jnp.broadcast_to((self.out < self.outputs)[:, None], (self.out.size, self.block_in))
        return plt.load(at, mask=inside, other=zero_of(ref))


def zero_of(ref: jax.Ref) -> int | float:
    """Triton makes no float of 8 bits from an integer."""
    return 0.0 if jnp.issubdtype(ref.dtype, jnp.floating) and ref.dtype.itemsize == 1 else 0
