"""A product of one row with the residual addition and the RMSNorm before it, in Pallas (Triton backend).

Each program reads the row beside its own tiles of the weight, a block ahead in registers, and adds and weighs
it on the way; the scale, known at the end, is that of the sums. So the weight streams from the start. All
programs read all of the row from the second-level cache, which costs less than a kernel of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Float32, Int32, Shaped

from lmdeploy_jax.pallas_kernels.blocks import dot
from lmdeploy_jax.pallas_kernels.launch import launch
from lmdeploy_jax.pallas_kernels.shapes import Unscaled
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


def unscaled_norm_skinny_gemm(
    x: Float[Array, "1 K"],
    parts: Float[Array, "S 1 K"],
    norm: Float[Array, "K"],
    weight: Float[Array, "1 N K"],
    tiling: Tiling,
    *,
    eps: float,
    offset: float,
    interpret: bool,
) -> tuple[Float[Array, "1 K"], Unscaled]:
    """See `lmdeploy_jax.pallas_kernels.skinny_gemm`."""
    how = launch_of("norm_skinny_gemm", weight.shape[1], tiling)
    kernel = functools.partial(_kernel, tiling=tiling, activation=None, eps=eps, offset=offset)
    out = [jax.ShapeDtypeStruct(x.shape, x.dtype), *unscaled_shapes(weight.shape[1], tiling)]
    added, *unscaled = launch(kernel, how, out, x, parts, norm, weight, interpret=interpret)
    return added, Unscaled(*unscaled)


def unscaled_shapes(outputs: int, tiling: Tiling) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Those of the arrays of an `Unscaled` product of one row."""
    shapes = (tiling.splits, 1, outputs), (tiling.splits,)
    return tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)


def _kernel(
    x_ref: jax.Ref,
    parts_ref: jax.Ref,
    norm_ref: jax.Ref,
    weight_ref: jax.Ref,
    added_ref: jax.Ref,
    out_ref: jax.Ref,
    mean_squares_ref: jax.Ref | None = None,
    *,
    tiling: Tiling,
    activation: Callable[[jax.Array], jax.Array] | None,
    eps: float,
    offset: float,
) -> None:
    tile = WeightTile(1, out_ref.shape[-1], tiling)
    row = ResidualRow(x_ref, parts_ref, norm_ref, added_ref, offset)
    size, halves = x_ref.shape[1], weight_ref.shape[0]
    first, last = share_of(size // tiling.block_in, tiling)

    def columns(index: jax.Array) -> Columns:
        return Columns(index * tiling.block_in + jnp.arange(tiling.block_in, dtype=jnp.int32)[None, :])

    def step(index: jax.Array, state: tuple[list[jax.Array], jax.Array, Row]) -> tuple:
        totals, squares, read = state
        ahead = row.read(columns(jnp.minimum(index + 1, last - 1)))
        wide, weighed = row.add(read, columns(index))
        column = jnp.broadcast_to(weighed.astype(x_ref.dtype), (tile.token.size, tiling.block_in)).T
        inner = index * tiling.block_in
        products = [dot(tile.read(weight_ref, inner, half), column) for half in range(halves)]
        totals = [total + product for total, product in zip(totals, products, strict=True)]
        return totals, squares + wide * wide, ahead

    zeros = jnp.zeros((1, tiling.block_in), jnp.float32)
    state = ([tile.zeros()] * halves, zeros, row.read(columns(jnp.int32(first))))
    totals, squares, _ = lax.fori_loop(first, last, step, state)
    if mean_squares_ref is not None:
        store_unscaled(tile, totals[0], jnp.sum(squares) * (1.0 / size), eps, out_ref, mean_squares_ref)
        return
    scale = lax.rsqrt(jnp.sum(squares, axis=1, keepdims=True) * (1.0 / size) + eps)
    totals = [total * scale for total in totals]
    out = totals[0] if activation is None else gated(totals[0], totals[1], activation, out_ref.dtype)
    plt.store(out_ref.at[tile.place], out.astype(out_ref.dtype), mask=tile.mask)


def share_of(blocks: int, tiling: Tiling) -> tuple[Any, Any]:
    """The first block of columns of this program, and the one after its last."""
    if tiling.splits == 1:
        return 0, blocks
    each = blocks // tiling.splits
    first = pl.program_id(1) * each
    return first, first + each


def store_unscaled(
    tile: WeightTile,
    total: Float32[Array, "out rows"],
    mean_square: Float32[Array, ""],
    eps: float,
    parts_ref: jax.Ref,
    mean_squares_ref: jax.Ref,
) -> None:
    """This program's share of an `Unscaled` product; the first one of each part stores its squares."""
    split, splits = pl.program_id(1), mean_squares_ref.shape[0]
    plt.store(parts_ref.at[split, *tile.place], total, mask=tile.mask)

    @pl.when(pl.program_id(0) == 0)
    def _store() -> None:
        mean_squares_ref[split] = mean_square + eps / splits


@dataclass(frozen=True)
class Columns:
    """Those of a block, in a row or in several, and which of them count; None: all."""

    index: Int32[Array, "rows columns"]
    mask: Bool[Array, "rows columns"] | None = None

    def load(self, ref: Any) -> Shaped[Array, "rows columns"]:
        """What lies there, zeros where columns do not count."""
        return plt.load(ref) if self.mask is None else plt.load(ref, mask=self.mask, other=0)


class ResidualRow:
    """A row of the residual stream x [1, K], parts [S, 1, K] of what is added, and the norm's weight [K]."""

    def __init__(self, x: jax.Ref, parts: jax.Ref, norm: jax.Ref, added: jax.Ref, offset: float) -> None:
        self.x, self.parts, self.norm, self.added, self.offset = x, parts, norm, added, offset
        self.first = pl.program_id(0) == 0

    def read(self, columns: Columns) -> Row:
        """What `add` adds up."""
        index = columns.index
        parts = [columns.load(self.parts.at[part, 0, index]) for part in range(self.parts.shape[0])]
        return columns.load(self.x.at[0, index]), columns.load(self.norm.at[index]), *parts

    def add(
        self, row: Row, columns: Columns
    ) -> tuple[Float32[Array, "rows columns"], Float32[Array, "rows columns"]]:
        """The row with its parts, which the first program stores, and the same times the norm's weight."""
        x, norm, *parts = row
        added = sum((part.astype(jnp.float32) for part in parts), x.astype(jnp.float32)).astype(x.dtype)
        first = jnp.broadcast_to(self.first, columns.index.shape)
        mask = first if columns.mask is None else first & columns.mask
        plt.store(self.added.at[0, columns.index], added, mask=mask)
        wide = added.astype(jnp.float32)
        return wide, wide * (norm.astype(jnp.float32) + self.offset)
