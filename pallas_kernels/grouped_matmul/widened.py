"""Sums over a quantised weight within a kernel: elements are widened, exactly, and sums of groups scaled.

Activations are not rounded, whatever the weights' author meant: the tensor cores that Triton reaches multiply
floats of 8 bits as numbers of 16, so that rounding would cost a launch and save nothing.
"""

from __future__ import annotations

import functools
import operator
from dataclasses import dataclass
from math import gcd

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jax.typing import DTypeLike
from jaxtyping import Array, BFloat16, Float32, Int32, Shaped, UInt16

from lmdeploy_jax.pallas_kernels.blocks import dot
from lmdeploy_jax.pallas_kernels.grouped_matmul.tile import FEW_ROWS, Tile, Tuning, block
from lmdeploy_jax.pallas_kernels.quant_gemm.blocks import OFFSET, exponents, unpacked, unpacked_e2m1
from lmdeploy_jax.pallas_kernels.quant_gemm.words import PER_WORD, tile_of

Index = Int32[Array, ""]
Half = tuple[int, ...]  # what stands between a group's number and the outputs
Total = Float32[Array, "out rows"]


@dataclass(frozen=True)
class WeightRefs:
    """values [X, *half, N, K], or K / 4 words; scales, of weights of few bits, and zeros [G, X, *half, N]."""

    values: jax.Ref
    scales: jax.Ref | None
    zeros: jax.Ref | None


def tuning(height: int, values: DTypeLike) -> Tuning:
    """Not measured yet."""
    words = jnp.dtype(values) == jnp.uint16
    if height <= FEW_ROWS:
        return Tuning(32, 256 if words else 128, 4, 3)
    if height <= 64:
        return Tuning(64, 128, 4, 3)
    return Tuning(64, 128, 8, 3)


def sums(
    tile: Tile, x_ref: jax.Ref, rows: Int32[Array, "rows"], weight: WeightRefs, *halves: Half, interpret: bool
) -> tuple[Total, ...]:
    """As `Tile.sums`."""
    words = weight.values.dtype == jnp.uint16
    blocks = (_Words if words else _Bytes)(tile, x_ref, rows, weight, interpret)

    def step(index: Index, totals: tuple[Total, ...]) -> tuple[Total, ...]:
        return blocks.add(totals, index, halves)

    totals = (jnp.zeros(tile.mask.shape, jnp.float32),) * len(halves)
    totals = lax.fori_loop(0, blocks.steps, step, totals)
    if not blocks.whole:
        return totals
    return tuple(total * blocks.scale(0, half)[:, None] for total, half in zip(totals, halves, strict=True))


class _Blocks:
    """Blocks of columns, one a step."""

    def __init__(
        self, tile: Tile, x_ref: jax.Ref, rows: Int32[Array, "rows"], weight: WeightRefs, interpret: bool
    ) -> None:
        self.tile, self.x_ref, self.rows, self.weight = tile, x_ref, rows, weight
        self.interpret = interpret
        self.columns, groups = x_ref.shape[1], weight.scales.shape[0]
        self.width, self.whole = self.columns // groups, groups == 1
        self.out_mask = tile.out_mask

    def x(self, column: Int32[Array, "columns"], inside: jax.Array | None) -> Shaped[Array, "columns rows"]:
        return block(self.x_ref, (), self.rows, column, self.tile.valid, inside).T

    def values(
        self, half: Half, column: Int32[Array, "columns"], inside: jax.Array | None
    ) -> Shaped[Array, "out columns"]:
        first = (self.tile.group, *half)
        return block(self.weight.values, first, self.tile.out, column, self.out_mask, inside)

    def scale(self, group: Index | int, half: Half) -> Float32[Array, "out"]:
        scales = self.of_outputs(self.weight.scales, group, half)
        return exponents(scales) if scales.dtype == jnp.uint8 else scales.astype(jnp.float32)

    def of_outputs(self, ref: jax.Ref, group: Index | int, half: Half) -> Shaped[Array, "out"]:
        """A group's row of an array [G, X, *half, N]."""
        at = ref.at[(group, self.tile.group, *half, self.tile.out)]
        return plt.load(at) if self.out_mask is None else plt.load(at, mask=self.out_mask, other=0)

    def scaled(self, product: Total, group: Index, half: Half) -> Total:
        return product if self.whole else product * self.scale(group, half)[:, None]


class _Bytes(_Blocks):
    """Of 8 bits an element."""

    @property
    def block_in(self) -> int:
        most = self.tile.tuning.block_in
        return most if self.whole else gcd(self.width, most)

    @property
    def steps(self) -> int:
        return pl.cdiv(self.columns, self.block_in)

    def add(self, totals: tuple[Total, ...], index: Index, halves: tuple[Half, ...]) -> tuple[Total, ...]:
        first = index * self.block_in
        column = first + jnp.arange(self.block_in, dtype=jnp.int32)
        inside = None if self.columns % self.block_in == 0 else column < self.columns
        x, group = self.x(column, inside), lax.div(first, self.width)
        products = (dot(self.values(half, column, inside).astype(x.dtype), x) for half in halves)
        parts = (self.scaled(product, group, half) for product, half in zip(products, halves, strict=True))
        return tuple(total + part for total, part in zip(totals, parts, strict=True))


class _Words(_Blocks):
    """Of 4 bits an element, a few tiles of columns that share words a step."""

    @property
    def tiles(self) -> int:
        """Of a step: so many that the steps are alike."""
        size = tile_of(self.columns)
        count = self.columns // size
        most = max(self.tile.tuning.block_in // size, 1)
        return max(number for number in range(1, most + 1) if count % number == 0)

    @property
    def steps(self) -> int:
        return self.columns // tile_of(self.columns) // self.tiles

    def add(self, totals: tuple[Total, ...], index: Index, halves: tuple[Half, ...]) -> tuple[Total, ...]:
        size = tile_of(self.columns)
        quarter = jnp.arange(size // PER_WORD, dtype=jnp.int32)
        for number in range(self.tiles):
            tile = index * self.tiles + number
            x = [self.x(tile * size + part * quarter.size + quarter, None) for part in range(PER_WORD)]
            words = (self.values(half, tile * quarter.size + quarter, None) for half in halves)
            both = zip(totals, words, halves, strict=True)
            totals = tuple(self._with_tile(total, each, x, tile * size, half) for total, each, half in both)
        return totals

    def _with_tile(
        self,
        total: Total,
        words: UInt16[Array, "out quarter"],
        x: list[Shaped[Array, "quarter rows"]],
        first: Index,
        half: Half,
    ) -> Total:
        """The sum with the products of one tile of columns."""
        quarter = words.shape[1]
        width = min(self.width, PER_WORD * quarter)
        for start in range(0, PER_WORD * quarter, width):
            group = lax.div(first + start, self.width)
            zero = self._zero(group, half, words.shape)
            parts = range(start // quarter, (start + width) // quarter)
            products = (
                dot(self._elements(words, part, zero).astype(x[part].dtype), x[part]) for part in parts
            )
            total += self.scaled(functools.reduce(operator.add, products), group, half)
        return total

    def _zero(
        self, group: Index, half: Half, shape: tuple[int, ...]
    ) -> BFloat16[Array, "out quarter"] | None:
        """What is taken from a nibble at the end of OFFSET; None: elements are E2M1's."""
        if self.weight.scales.dtype == jnp.uint8:
            return None
        if self.weight.zeros is None:
            return jnp.full(shape, OFFSET + 8, jnp.bfloat16)
        zeros = self.of_outputs(self.weight.zeros, group, half).astype(jnp.float32)
        return jnp.broadcast_to((zeros + OFFSET).astype(jnp.bfloat16)[:, None], shape)

    def _elements(
        self, words: UInt16[Array, "out quarter"], part: int, zero: BFloat16[Array, "out quarter"] | None
    ) -> BFloat16[Array, "out quarter"]:
        """Those that nibble number `part` of each word holds."""
        if zero is None:
            return unpacked_e2m1(words, part, self.interpret)
        return unpacked(words, part, zero, self.interpret)
