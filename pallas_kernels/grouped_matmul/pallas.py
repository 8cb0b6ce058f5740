"""Grouped products in Pallas (Triton backend): one launch over the work list.

A program multiplies one tile's rows with a block of outputs of their group's weight, which is the tensor
cores' left operand as in `skinny_gemm`. Programs of slots without rows leave at once, so that the grid is the
same whatever the tokens choose. Nothing is split along the inner axis: a group's outputs alone make more
blocks than an H200 has cores (one token of Qwen3-30B-A3B: 8 x 24 and 8 x 64).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from lmdeploy_jax.pallas_kernels.blocks import dot
from lmdeploy_jax.pallas_kernels.grouped_matmul.groups import RowGroups
from lmdeploy_jax.pallas_kernels.grouped_matmul.xla import Gating
from lmdeploy_jax.pallas_kernels.launch import Launch, launch

FEW_ROWS = 16  # of the smallest tensor-core product, and of a decode step's tiles


@dataclass(frozen=True)
class Tuning:
    """Outputs and inner elements of a block; Triton's warps and pipeline stages."""

    block_out: int
    block_in: int
    num_warps: int
    num_stages: int


def gated_grouped_matmul(
    x: Float[Array, "T K"],
    weight: Float[Array, "X H N K"],
    bias: Float[Array, "X H N"] | None,
    groups: RowGroups,
    gating: Gating,
    height: int,
    *,
    tuning: Tuning | None = None,
    interpret: bool,
) -> Float[Array, "M N"]:
    """See `lmdeploy_jax.pallas_kernels.grouped_matmul`."""
    rows, outputs = groups.source.shape[0], weight.shape[2]
    tuning = tuning or _tuning(height, gated=True, dtype=x.dtype)
    kernel = functools.partial(
        _gated_kernel, choices=rows // x.shape[0], gating=gating, height=height, tuning=tuning
    )
    how = _launch("gated_grouped_matmul", outputs, groups, tuning)
    out = jax.ShapeDtypeStruct((rows, outputs), x.dtype)
    return launch(kernel, how, out, x, weight, bias, groups.source, groups.tiles, interpret=interpret)


def weighted_grouped_matmul(
    rows: Float[Array, "M K"],
    weight: Float[Array, "X N K"],
    bias: Float[Array, "X N"] | None,
    groups: RowGroups,
    scales: Float32[Array, "T k"],
    height: int,
    out_dtype: DTypeLike,
    *,
    tuning: Tuning | None = None,
    interpret: bool,
) -> Float[Array, "k T N"]:
    """See `lmdeploy_jax.pallas_kernels.grouped_matmul`."""
    (tokens, choices), outputs = scales.shape, weight.shape[1]
    tuning = tuning or _tuning(height, gated=False, dtype=rows.dtype)
    kernel = functools.partial(_weighted_kernel, height=height, tuning=tuning)
    how = _launch("weighted_grouped_matmul", outputs, groups, tuning)
    out = jax.ShapeDtypeStruct((choices, tokens, outputs), out_dtype)
    arrays = (rows, weight, bias, groups.source, groups.tiles, scales.reshape(-1))
    return launch(kernel, how, out, *arrays, interpret=interpret)


def _tuning(height: int, *, gated: bool, dtype: jnp.dtype) -> Tuning:
    """As measured on an H200 for few rows; of many, blocks whose sums fit the registers."""
    if dtype.itemsize > 2:
        return Tuning(32, 32, 4, 2)
    if height <= FEW_ROWS:
        return Tuning(64, 128, 4, 3)
    if height <= 64:
        return Tuning(64, 64, 4, 4)
    return Tuning(64 if gated else 128, 64, 8, 4)


def _launch(name: str, outputs: int, groups: RowGroups, tuning: Tuning) -> Launch:
    """Tiles of one group are neighbours in time: what the first of them reads, the others find in L2."""
    grid = (pl.cdiv(outputs, tuning.block_out), groups.tiles.shape[0])
    return Launch(name, grid, tuning.num_warps, tuning.num_stages)


def _gated_kernel(
    x_ref: jax.Ref,
    weight_ref: jax.Ref,
    bias_ref: jax.Ref | None,
    source_ref: jax.Ref,
    tiles_ref: jax.Ref,
    out_ref: jax.Ref,
    *,
    choices: int,
    gating: Gating,
    height: int,
    tuning: Tuning,
) -> None:
    tile = _Tile(tiles_ref, height, out_ref.shape[1], tuning)

    @pl.when(tile.count > 0)
    def _multiply() -> None:
        token = lax.div(tile.read(source_ref), choices)
        totals = tile.sums(x_ref, token, weight_ref, *((half,) for half in range(weight_ref.shape[1])))
        halves = (tile.biased(total, bias_ref, half) for half, total in enumerate(totals))
        rounded = (half.astype(out_ref.dtype).astype(jnp.float32) for half in halves)
        plt.store(out_ref.at[tile.place], gating(*rounded).astype(out_ref.dtype), mask=tile.mask)


def _weighted_kernel(
    rows_ref: jax.Ref,
    weight_ref: jax.Ref,
    bias_ref: jax.Ref | None,
    source_ref: jax.Ref,
    tiles_ref: jax.Ref,
    scales_ref: jax.Ref,
    out_ref: jax.Ref,
    *,
    height: int,
    tuning: Tuning,
) -> None:
    choices, tokens, outputs = out_ref.shape
    tile = _Tile(tiles_ref, height, outputs, tuning)

    @pl.when(tile.count > 0)
    def _multiply() -> None:
        (total,) = tile.sums(rows_ref, tile.row, weight_ref, ())
        source = tile.read(source_ref)
        scale = plt.load(scales_ref.at[source], mask=tile.valid, other=0.0)
        total = tile.biased(total, bias_ref) * scale[None, :]
        # Nothing is masked at another row's place: the interpreter stores what was there before.
        token, choice = jnp.where(tile.valid, lax.div(source, choices), tokens), lax.rem(source, choices)
        at = out_ref.at[choice[None, :], token[None, :], tile.out[:, None]]
        plt.store(at, total.astype(out_ref.dtype), mask=tile.mask)


class _Tile:
    """The rows and outputs of this program; blocks are [outputs, rows]."""

    def __init__(self, tiles_ref: jax.Ref, height: int, outputs: int, tuning: Tuning) -> None:
        block, slot = pl.program_id(0), pl.program_id(1)
        self.tuning, self.outputs = tuning, outputs
        self.group, first, self.count = (tiles_ref[slot, column] for column in range(3))
        number = jnp.arange(height, dtype=jnp.int32)
        self.row, self.valid = first + number, number < self.count
        self.out = block * tuning.block_out + jnp.arange(tuning.block_out, dtype=jnp.int32)
        self.mask = (self.out < outputs)[:, None] & self.valid[None, :]

    @property
    def place(self) -> tuple[jax.Array, jax.Array]:
        """In [M, N]."""
        return self.row[None, :], self.out[:, None]

    def read(self, ref: jax.Ref) -> jax.Array:
        """A number of each row."""
        return plt.load(ref.at[self.row], mask=self.valid, other=0)

    def biased(self, total: jax.Array, ref: jax.Ref | None, *half: int) -> jax.Array:
        """The sums with their group's bias."""
        if ref is None:
            return total
        bias = plt.load(ref.at[(self.group, *half, self.out)], mask=self.out < self.outputs, other=0)
        return total + bias.astype(jnp.float32)[:, None]

    def sums(
        self, x_ref: jax.Ref, rows: jax.Array, weight_ref: jax.Ref, *halves: tuple[int, ...]
    ) -> tuple[jax.Array, ...]:
        """The products of such rows of x with parts of their group's weight, f32 [outputs, rows] each."""
        inner, block_in = x_ref.shape[1], self.tuning.block_in
        whole = self.outputs % self.tuning.block_out == 0
        out = None if whole else self.out < self.outputs

        def step(index: jax.Array, totals: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            column = index * block_in + jnp.arange(block_in, dtype=jnp.int32)
            inside = None if inner % block_in == 0 else column < inner
            x = _block(x_ref, (), rows, column, self.valid, inside).T
            read = functools.partial(_block, rows=self.out, columns=column, row_mask=out, column_mask=inside)
            parts = (dot(read(weight_ref, (self.group, *half)), x) for half in halves)
            return tuple(total + part for total, part in zip(totals, parts, strict=True))

        zeros = jnp.zeros(self.mask.shape, jnp.float32)
        return lax.fori_loop(0, pl.cdiv(inner, block_in), step, (zeros,) * len(halves))


def _block(
    ref: jax.Ref,
    first: tuple[jax.Array | int, ...],
    rows: jax.Array,
    columns: jax.Array,
    row_mask: jax.Array | None,
    column_mask: jax.Array | None,
) -> jax.Array:
    """A block of the matrix at `first`; zeros where a mask is false. None: all are inside."""
    at = ref.at[(*first, rows[:, None], columns[None, :])]
    if row_mask is None and column_mask is None:
        return plt.load(at)
    shape = (rows.size, columns.size)
    mask = jnp.ones(shape, jnp.bool_) if row_mask is None else jnp.broadcast_to(row_mask[:, None], shape)
    mask = mask if column_mask is None else mask & column_mask[None, :]
    return plt.load(at, mask=mask, other=0)
