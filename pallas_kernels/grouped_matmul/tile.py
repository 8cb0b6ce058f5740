"""The rows and outputs of a program of a grouped product, and its sums over a weight of 16 or 32 bits."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Bool, Float32, Int32, Shaped

from lmdeploy_jax.pallas_kernels.blocks import dot
from lmdeploy_jax.pallas_kernels.skinny_gemm.pallas import zero_of

FEW_ROWS = 16  # of the smallest tensor-core product, and of a decode step's tiles


@dataclass(frozen=True)
class Tuning:
    """Outputs and inner elements of a block; Triton's warps and pipeline stages."""

    block_out: int
    block_in: int
    num_warps: int
    num_stages: int


class Tile:
    """The rows and outputs of this program; blocks are [outputs, rows]."""

    def __init__(self, tiles_ref: jax.Ref, height: int, groups: int, outputs: int, tuning: Tuning) -> None:
        """tiles_ref: as in `RowGroups`; groups: how many there are."""
        block, slot = pl.program_id(0), pl.program_id(1)
        self.tuning, self.outputs = tuning, outputs
        if len(tiles_ref.shape) == 1:
            self.group, first = tiles_ref[slot], slot
            self.count = (self.group < groups).astype(jnp.int32)
        else:
            self.group, first, self.count = (tiles_ref[slot, column] for column in range(3))
        number = jnp.arange(height, dtype=jnp.int32)
        self.row, self.valid = first + number, number < self.count
        self.out = block * tuning.block_out + jnp.arange(tuning.block_out, dtype=jnp.int32)
        self.mask = (self.out < outputs)[:, None] & self.valid[None, :]

    @property
    def out_mask(self) -> jax.Array | None:
        """Which outputs there are; None: all."""
        return None if self.outputs % self.tuning.block_out == 0 else self.out < self.outputs

    @property
    def place(self) -> tuple[jax.Array, jax.Array]:
        """In [M, N]."""
        return self.row[None, :], self.out[:, None]

    def source(self, ref: jax.Ref | None) -> Int32[Array, "M"]:
        """The place before sorting of each row; None: its own."""
        return self.row if ref is None else plt.load(ref.at[self.row], mask=self.valid, other=0)

    def biased(self, total: Float32[Array, "N M"], ref: jax.Ref | None, *half: int) -> Float32[Array, "N M"]:
        """The sums with their group's bias."""
        if ref is None:
            return total
        bias = plt.load(ref.at[(self.group, *half, self.out)], mask=self.out < self.outputs, other=0)
        return total + bias.astype(jnp.float32)[:, None]

    def sums(
        self, x_ref: jax.Ref, rows: Int32[Array, "M"], weight_ref: jax.Ref, *halves: tuple[int, ...]
    ) -> tuple[Float32[Array, "N M"], ...]:
        """The products of such rows of x with parts of their group's weight, f32 [outputs, rows] each."""
        inner, block_in = x_ref.shape[1], self.tuning.block_in
        out = self.out_mask

        def step(index: jax.Array, totals: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            column = index * block_in + jnp.arange(block_in, dtype=jnp.int32)
            inside = None if inner % block_in == 0 else column < inner
            x = block(x_ref, (), rows, column, self.valid, inside).T
            read = functools.partial(block, rows=self.out, columns=column, row_mask=out, column_mask=inside)
            parts = (dot(read(weight_ref, (self.group, *half)), x) for half in halves)
            return tuple(total + part for total, part in zip(totals, parts, strict=True))

        zeros = jnp.zeros(self.mask.shape, jnp.float32)
        return lax.fori_loop(0, pl.cdiv(inner, block_in), step, (zeros,) * len(halves))


def block(
    ref: jax.Ref,
    first: tuple[Int32[Array, ""] | int, ...],
    rows: Int32[Array, "R"],
    columns: Int32[Array, "C"],
    row_mask: Bool[Array, "R"] | None,
    column_mask: Bool[Array, "C"] | None,
) -> Shaped[Array, "R C"]:
    """A block of the matrix at `first`; zeros where a mask is false. None: all are inside."""
    at = ref.at[(*first, rows[:, None], columns[None, :])]
    if row_mask is None and column_mask is None:
        return plt.load(at)
    shape = (rows.size, columns.size)
    mask = jnp.ones(shape, jnp.bool_) if row_mask is None else jnp.broadcast_to(row_mask[:, None], shape)
    mask = mask if column_mask is None else mask & column_mask[None, :]
    return plt.load(at, mask=mask, other=zero_of(ref))
