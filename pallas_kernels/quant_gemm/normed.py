"""A quantised product of one row with the residual addition and the norm before it, in Pallas (for Triton).

As `skinny_gemm/normed.py`. What the norm gives stays in 16 bits, or is rounded to 8 a block of columns with a
scale, for which no program needs the norm's own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as plt
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped

from lmdeploy_jax.pallas_kernels.blocks import dot
from lmdeploy_jax.pallas_kernels.launch import launch
from lmdeploy_jax.pallas_kernels.quant_gemm.blocks import (
    QUARTER,
    EightBits,
    FourBits,
    Index,
    Refs,
    Totals,
    of_outputs,
    unpacked,
)
from lmdeploy_jax.pallas_kernels.quant_gemm.words import PER_WORD, TILE
from lmdeploy_jax.pallas_kernels.shapes import Quantised, Unscaled
from lmdeploy_jax.pallas_kernels.skinny_gemm.normed import (
    Columns,
    ResidualRow,
    Row,
    share_of,
    store_unscaled,
    unscaled_shapes,
)
from lmdeploy_jax.pallas_kernels.skinny_gemm.pallas import WeightTile, gated, launch_of
from lmdeploy_jax.pallas_kernels.skinny_gemm.tiling import Tiling


def norm_quant_gemm(
    x: Float[Array, "1 K"],
    parts: Float[Array, "S 1 K"],
    norm: Float[Array, "K"],
    weight: Quantised,
    tiling: Tiling,
    activation: Callable[[jax.Array], jax.Array] | None,
    *,
    eps: float,
    offset: float,
    out_dtype: DTypeLike,
    interpret: bool,
) -> tuple[Float[Array, "1 K"], Float[Array, "1 N"]]:
    """See `lmdeploy_jax.pallas_kernels.quant_gemm`; weight [halves, N, K]."""
    outputs = weight.values.shape[1]
    out = [jax.ShapeDtypeStruct(x.shape, x.dtype), jax.ShapeDtypeStruct((1, outputs), out_dtype)]
    how: dict[str, Any] = {"tiling": tiling, "activation": activation, "eps": eps, "offset": offset}
    arrays = (x, parts, norm, weight.values, weight.scales, weight.zeros)
    cut = launch_of("norm_quant_gemm", outputs, tiling)
    kernel = functools.partial(_kernel, **how, interpret=interpret)
    added, product = launch(kernel, cut, out, *arrays, interpret=interpret)
    return added, product


def unscaled_norm_quant_gemm(
    x: Float[Array, "1 K"],
    parts: Float[Array, "S 1 K"],
    norm: Float[Array, "K"],
    weight: Quantised,
    tiling: Tiling,
    *,
    eps: float,
    offset: float,
    interpret: bool,
) -> tuple[Float[Array, "1 K"], Unscaled]:
    """See `lmdeploy_jax.pallas_kernels.quant_gemm`; weight [1, N, K]."""
    outputs = weight.values.shape[1]
    how: dict[str, Any] = {"tiling": tiling, "activation": None, "eps": eps, "offset": offset}
    kernel = functools.partial(_kernel, **how, interpret=interpret)
    cut, arrays = launch_of("norm_quant_gemm", outputs, tiling), (x, parts, norm, *weight)
    out = [jax.ShapeDtypeStruct(x.shape, x.dtype), *unscaled_shapes(outputs, tiling)]
    added, *unscaled = launch(kernel, cut, out, *arrays, interpret=interpret)
    return added, Unscaled(*unscaled)


def _kernel(
    x_ref: jax.Ref,
    parts_ref: jax.Ref,
    norm_ref: jax.Ref,
    values_ref: jax.Ref,
    scales_ref: jax.Ref,
    zeros_ref: jax.Ref | None,
    added_ref: jax.Ref,
    out_ref: jax.Ref,
    mean_squares_ref: jax.Ref | None = None,
    *,
    tiling: Tiling,
    activation: Callable[[jax.Array], jax.Array] | None,
    eps: float,
    offset: float,
    interpret: bool,
) -> None:
    tile = WeightTile(1, out_ref.shape[-1], tiling)
    refs = Refs(x_ref, None, values_ref, scales_ref, zeros_ref)
    words, size = values_ref.dtype == jnp.uint16, x_ref.shape[1]
    blocks = (
        FourBitsOfOneRow(tile, refs, interpret) if words else EightBitsOfOneRow(tile, refs, tiling, interpret)
    )
    row = ResidualRow(x_ref, parts_ref, norm_ref, added_ref, offset)
    begin, end = share_of(size // blocks.width, tiling)

    def step(index: Index, state: tuple[Totals, jax.Array, Row]) -> tuple[Totals, jax.Array, Row]:
        totals, squares, read = state
        ahead = row.read(blocks.columns(jnp.minimum(index + 1, end - 1)))
        wide, weighed = row.add(read, blocks.columns(index))
        return blocks.add_row(totals, index, weighed), squares + wide * wide, ahead

    first = blocks.columns(jnp.int32(begin))
    state = (blocks.zeros(), jnp.zeros(first.index.shape, jnp.float32), row.read(first))
    totals, squares, _ = lax.fori_loop(begin, end, step, state)
    if mean_squares_ref is not None:
        (total,), mean_square = blocks.scaled(totals), jnp.sum(squares) * (1.0 / size)
        store_unscaled(tile, total, mean_square, eps, out_ref, mean_squares_ref)
        return
    scale = lax.rsqrt(jnp.sum(squares) * (1.0 / size) + eps)
    totals = [total * scale for total in blocks.scaled(totals)]
    out = totals[0] if activation is None else gated(totals[0], totals[1], activation, out_ref.dtype)
    plt.store(out_ref.at[tile.place], out.astype(out_ref.dtype), mask=tile.mask)


class EightBitsOfOneRow(EightBits):
    """A block of columns at a time."""

    def __init__(self, tile: WeightTile, refs: Refs, tiling: Tiling, interpret: bool) -> None:
        super().__init__(tile, refs, tiling, interpret)
        self.width = tile.block_in

    def columns(self, block: Index) -> Columns:
        return Columns(block * self.width + jnp.arange(self.width, dtype=jnp.int32)[None, :])


class FourBitsOfOneRow(FourBits):
    """A tile of columns at a time, whose quarters are as many rows: all of them meet the nibbles of each.

    So a tile of x is read and turned once. Of the sums of each quarter's nibbles one column counts.
    """

    width = TILE

    def columns(self, block: Index) -> Columns:
        quarter, column = self.tile.token[:, None], jnp.arange(QUARTER, dtype=jnp.int32)[None, :]
        inside = jnp.broadcast_to(quarter < PER_WORD, (self.tile.token.size, QUARTER))
        return Columns(block * TILE + quarter * QUARTER + column, inside)

    def add_row(self, totals: Totals, block: Index, x: Float[Array, "#rows columns"]) -> Totals:
        """Adds the products of tile number `block` of the columns."""
        x = x.astype(self.refs.x.dtype).T
        return [total + self._product(block, half, x) for half, total in enumerate(totals)]

    def _product(self, number: Index, half: int, x: Shaped[Array, "columns rows"]) -> Array:
        """The sum of each quarter of tile `number`, in a column of its own."""
        words, width, token = self._words(number, half), min(self.refs.width, TILE), self.tile.token[None, :]
        total = self.tile.zeros()
        for first in range(0, TILE, width):
            group = lax.div(number * TILE + first, self.refs.width)
            zero, quarters = self._zero(group, half), range(first // QUARTER, (first + width) // QUARTER)
            sums = [dot(unpacked(words, quarter, zero, self.interpret), x) for quarter in quarters]
            picked = sums[0] if width == TILE else jnp.where(token == quarters[0], sums[0], 0)
            for quarter, its in zip(quarters[1:], sums[1:], strict=True):
                picked = jnp.where(token == quarter, its, picked)
            if not self.whole:
                picked *= of_outputs(self.tile, self.refs.scales, group, half)[:, None]
            total = picked if width == TILE else total + picked
        return total

    def scaled(self, totals: Totals) -> Totals:
        sums = [jnp.sum(total, axis=1, keepdims=True) for total in totals]
        return super().scaled([jnp.broadcast_to(total, self.tile.mask.shape) for total in sums])
