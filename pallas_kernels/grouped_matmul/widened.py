"""Sums over a quantised weight within a kernel: elements are widened, exactly, and sums of groups scaled.

Activations are not rounded, whatever the weights' author meant: the tensor cores that Triton reaches multiply
floats of 8 bits as numbers of 16, so that rounding would cost a launch and save nothing.
"""

from __future__ import annotations

import functools
import operator
from dataclasses import dataclass
from math import gcd
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, BFloat16, Bool, Float32, Int32, Shaped, UInt8, UInt16

from lmdeploy_jax.pallas_kernels.blocks import dot
from lmdeploy_jax.pallas_kernels.grouped_matmul.tile import FEW_ROWS, Tile, Tuning, block
from lmdeploy_jax.pallas_kernels.quant_gemm.blocks import (
    LIFTED,
    OFFSET,
    exponents,
    scaled_e2m1,
    unpacked,
    unpacked_e2m1,
)
from lmdeploy_jax.pallas_kernels.quant_gemm.words import PER_WORD, tile_of
from lmdeploy_jax.pallas_kernels.shapes import Quantised

SUBNORMAL = 126  # power of two by which the bits of E2M1, as a bfloat16's, mean less
LARGEST_EXPONENT = 254  # of a bfloat16, as it is stored
FEW_TILES = 32  # with which larger blocks leave cores without work
Index = Int32[Array, ""]
Half = tuple[int, ...]  # what stands between a group's number and the outputs
Total = Float32[Array, "out rows"]


@dataclass(frozen=True)
class WeightRefs:
    """values [X, *half, N, K], or K / 4 words; scales and zeros [G, X, *half, N]."""

    values: jax.Ref
    scales: jax.Ref
    zeros: jax.Ref | None


class _Factors(NamedTuple):
    """Of a group of columns: as they are read."""

    scales: Shaped[Array, "out"]
    zeros: Shaped[Array, "out"] | None

    @property
    def scale(self) -> Float32[Array, "out"]:
        scales = self.scales
        return exponents(scales) if scales.dtype == jnp.uint8 else scales.astype(jnp.float32)


Totals = tuple[Total, ...]  # of each half
Fetched = tuple[tuple[_Factors, ...], ...]  # of each group of a step, and half


def tuning(height: int, tiles: int, weight: Quantised) -> Tuning:
    """As measured on an H200 for 4 bits and few rows, where unpacking takes longer than reading: warps that
    share a block of outputs would do some of it twice. Those of 8 bits, and many rows, are not measured.
    """
    powers = weight.scales.dtype == jnp.uint8  # as elements are multiplied by, which takes registers
    if height > FEW_ROWS:
        return Tuning(64, 128, 4, 3) if height <= 64 else Tuning(64 if powers else 128, 128, 8, 3)
    if weight.values.dtype != jnp.uint16:
        return Tuning(32, 128, 2, 4)
    if powers:
        return Tuning(64, 256, 2, 3)
    return Tuning(32 if tiles <= FEW_TILES else 64, 256, 2, 3)


def sums(
    tile: Tile, x_ref: jax.Ref, rows: Int32[Array, "rows"], weight: WeightRefs, *halves: Half, interpret: bool
) -> tuple[Total, ...]:
    """As `Tile.sums`.

    Scales are read a step ahead: unlike blocks, Triton would not read them before they are needed.
    """
    blocks = _way(x_ref, weight)(tile, x_ref, rows, weight, halves, interpret)

    def step(index: Index, carry: tuple[Totals, Fetched]) -> tuple[Totals, Fetched]:
        totals, fetched = carry
        ahead = fetched if blocks.whole else blocks.fetch(jnp.minimum(index + 1, blocks.steps - 1))
        return blocks.add(totals, index, fetched), ahead

    totals = (jnp.zeros(tile.mask.shape, jnp.float32),) * len(halves)
    totals, fetched = lax.fori_loop(0, blocks.steps, step, (totals, blocks.fetch(jnp.int32(0))))
    return blocks.finished(totals, fetched)


def _way(x_ref: jax.Ref, weight: WeightRefs) -> type[_Bytes | _Words | _PowerWords]:
    """float16 has no room for elements that their scales have been multiplied with."""
    if weight.values.dtype != jnp.uint16:
        return _Bytes
    powers = weight.scales.dtype == jnp.uint8 and x_ref.dtype != jnp.float16
    return _PowerWords if powers else _Words


class _Blocks:
    """Blocks of columns, one a step."""

    def __init__(
        self,
        tile: Tile,
        x_ref: jax.Ref,
        rows: Int32[Array, "rows"],
        weight: WeightRefs,
        halves: tuple[Half, ...],
        interpret: bool,
    ) -> None:
        self.tile, self.x_ref, self.rows, self.weight = tile, x_ref, rows, weight
        self.halves, self.interpret = halves, interpret
        self.columns, groups = x_ref.shape[1], weight.scales.shape[0]
        self.width, self.whole = self.columns // groups, groups == 1

    def x(self, column: Int32[Array, "columns"], inside: jax.Array | None) -> Shaped[Array, "columns rows"]:
        return block(self.x_ref, (), self.rows, column, self.tile.valid, inside).T

    def values(
        self, half: Half, column: Int32[Array, "columns"], inside: jax.Array | None
    ) -> Shaped[Array, "out columns"]:
        first = (self.tile.group, *half)
        return block(self.weight.values, first, self.tile.out, column, self.tile.out_mask, inside)

    def factors(self, group: Index) -> tuple[_Factors, ...]:
        """Those of a group of columns, of each half."""
        zeros = self.weight.zeros
        return tuple(
            _Factors(
                self._of_outputs(self.weight.scales, group, half),
                None if zeros is None else self._of_outputs(zeros, group, half),
            )
            for half in self.halves
        )

    def _of_outputs(self, ref: jax.Ref, group: Index, half: Half) -> Shaped[Array, "out"]:
        """A group's row of an array [G, X, *half, N]."""
        at, mask = ref.at[(group, self.tile.group, *half, self.tile.out)], self.tile.out_mask
        return plt.load(at) if mask is None else plt.load(at, mask=mask, other=0)

    def finished(self, totals: Totals, fetched: Fetched) -> Totals:
        if not self.whole:
            return totals
        return tuple(total * each.scale[:, None] for total, each in zip(totals, fetched[0], strict=True))

    def scaled(self, product: Total, factors: _Factors) -> Total:
        return product if self.whole else product * factors.scale[:, None]


class _Bytes(_Blocks):
    """Of 8 bits an element; a step has columns of one group."""

    @property
    def block_in(self) -> int:
        most = self.tile.tuning.block_in
        return most if self.whole else gcd(self.width, most)

    @property
    def steps(self) -> int:
        return pl.cdiv(self.columns, self.block_in)

    def fetch(self, index: Index) -> Fetched:
        return (self.factors(lax.div(index * self.block_in, self.width)),)

    def add(self, totals: Totals, index: Index, fetched: Fetched) -> Totals:
        column = index * self.block_in + jnp.arange(self.block_in, dtype=jnp.int32)
        inside = None if self.columns % self.block_in == 0 else column < self.columns
        x = self.x(column, inside)
        products = (dot(self.values(half, column, inside).astype(x.dtype), x) for half in self.halves)
        parts = (self.scaled(product, each) for product, each in zip(products, fetched[0], strict=True))
        return tuple(total + part for total, part in zip(totals, parts, strict=True))


class _Words(_Blocks):
    """Of 4 bits an element; a step has a few tiles of columns that share words."""

    @property
    def tile_columns(self) -> int:
        return tile_of(self.columns)

    @property
    def tiles(self) -> int:
        """Of a step: so many that the steps are alike."""
        count = self.columns // self.tile_columns
        most = max(self.tile.tuning.block_in // self.tile_columns, 1)
        return max(number for number in range(1, most + 1) if count % number == 0)

    @property
    def steps(self) -> int:
        return self.columns // self.tile_columns // self.tiles

    @property
    def starts(self) -> range:
        """Where in a tile groups begin, or the part of a group that it is."""
        return range(0, self.tile_columns, min(self.width, self.tile_columns))

    def fetch(self, index: Index) -> Fetched:
        firsts = [(index * self.tiles + tile) * self.tile_columns for tile in range(self.tiles)]
        groups = (lax.div(first + start, self.width) for first in firsts for start in self.starts)
        return (self.factors(jnp.int32(0)),) if self.whole else tuple(map(self.factors, groups))

    def add(self, totals: Totals, index: Index, fetched: Fetched) -> Totals:
        quarter = jnp.arange(self.tile_columns // PER_WORD, dtype=jnp.int32)
        for number in range(self.tiles):
            tile = index * self.tiles + number
            first = tile * self.tile_columns
            x = [self.x(first + part * quarter.size + quarter, None) for part in range(PER_WORD)]
            words = [self.values(half, tile * quarter.size + quarter, None) for half in self.halves]
            groups = fetched if self.whole else fetched[number * len(self.starts) :]
            for start, factors in zip(self.starts, groups, strict=False):
                columns = range(start // quarter.size, (start + self.starts.step) // quarter.size)
                parts = zip(words, factors, strict=True)
                products = (self._product(half, each, x, columns) for half, each in parts)
                totals = tuple(total + part for total, part in zip(totals, products, strict=True))
        return totals

    def _product(
        self,
        words: UInt16[Array, "out quarter"],
        factors: _Factors,
        x: list[Shaped[Array, "quarter rows"]],
        parts: range,
    ) -> Total:
        """Of the columns that such nibbles of each word hold, which are of one group."""
        zero = None if self.weight.scales.dtype == jnp.uint8 else _broadcast(factors.zeros, words.shape)
        elements = {part: self._elements(words, part, zero) for part in parts}
        products = (dot(block.astype(x[part].dtype), x[part]) for part, block in elements.items())
        return self.scaled(functools.reduce(operator.add, products), factors)

    def _elements(
        self, words: UInt16[Array, "out quarter"], part: int, zero: BFloat16[Array, "out quarter"] | None
    ) -> BFloat16[Array, "out quarter"]:
        """Those that nibble number `part` of each word holds; without a zero they are E2M1's."""
        if zero is None:
            return unpacked_e2m1(words, part, self.interpret)
        return unpacked(words, part, zero, self.interpret)


class _PowerWords(_Words):
    """Of E2M1 with powers of two as scales: elements are multiplied by them, so that a product has columns of
    several groups. A step has the words of several tiles; each nibble of theirs gives a product.
    """

    @property
    def tiles(self) -> int:
        return max(self.tile.tuning.block_in // self.tile_columns, 1)

    @property
    def steps(self) -> int:
        return pl.cdiv(self.columns // self.tile_columns, self.tiles)

    def fetch(self, index: Index) -> Fetched:
        number = index * self.tiles + jnp.arange(self.tiles, dtype=jnp.int32)
        firsts = (number * self.tile_columns + start for start in self.starts)
        return tuple(self._factors(lax.div(first, self.width), number) for first in firsts)

    def _factors(self, group: Int32[Array, "tiles"], number: Int32[Array, "tiles"]) -> tuple[_Factors, ...]:
        """[out, tiles] of each half."""
        mask = jnp.broadcast_to((number < self.columns // self.tile_columns)[None], self.factors_shape)
        mask = mask if self.tile.out_mask is None else mask & self.tile.out_mask[:, None]
        at = group[None], self.tile.group
        places = ((*at, *half, self.tile.out[:, None]) for half in self.halves)
        ref = self.weight.scales
        return tuple(_Factors(plt.load(ref.at[place], mask=mask, other=0), None) for place in places)

    @property
    def factors_shape(self) -> tuple[int, int]:
        return self.tile.out.size, self.tiles

    def add(self, totals: Totals, index: Index, fetched: Fetched) -> Totals:
        quarter = self.tile_columns // PER_WORD
        word = index * self.tiles * quarter + jnp.arange(self.tiles * quarter, dtype=jnp.int32)
        count = self.columns // PER_WORD
        inside = None if count % word.size == 0 else word < count
        first = lax.div(word, quarter) * self.tile_columns + lax.rem(word, quarter)
        x = [self.x(first + part * quarter, inside) for part in range(PER_WORD)]
        return tuple(
            total + self._products(half, number, word, inside, x, fetched)
            for number, (total, half) in enumerate(zip(totals, self.halves, strict=True))
        )

    def _products(
        self,
        half: Half,
        number: int,
        word: Int32[Array, "words"],
        inside: Bool[Array, "words"] | None,
        x: list[Shaped[Array, "words rows"]],
        fetched: Fetched,
    ) -> Total:
        """Of a step's words of half `number`."""
        words = self.values(half, word, inside)
        scales = (factors[number].scales for factors in fetched)
        spread = [self._spread(scale, words.shape) for scale in scales]
        each = PER_WORD // len(spread)  # quarters of a group, or of what a tile has of it
        products = (
            dot(scaled_e2m1(words, part, spread[part // each], self.interpret).astype(x[part].dtype), x[part])
            for part in range(PER_WORD)
        )
        return functools.reduce(operator.add, products)

    def _spread(
        self, scales: UInt8[Array, "out tiles"], shape: tuple[int, ...]
    ) -> BFloat16[Array, "out words"]:
        """2^LIFTED times what they stand for, of each word."""
        bits = jnp.minimum(scales.astype(jnp.int32) + LIFTED, LARGEST_EXPONENT) << 7
        powers = lax.bitcast_convert_type(bits.astype(jnp.uint16), jnp.bfloat16)[:, :, None]
        return jnp.broadcast_to(powers, (*scales.shape, self.tile_columns // PER_WORD)).reshape(shape)

    def finished(self, totals: Totals, fetched: Fetched) -> Totals:
        power = 2.0 ** ((0 if self.interpret else SUBNORMAL) - LIFTED)
        return tuple(total * power for total in totals)


def _broadcast(zeros: Shaped[Array, "out"] | None, shape: tuple[int, ...]) -> BFloat16[Array, "out quarter"]:
    """What is taken from a nibble at the end of OFFSET."""
    if zeros is None:
        return jnp.full(shape, OFFSET + 8, jnp.bfloat16)
    return jnp.broadcast_to((zeros.astype(jnp.float32) + OFFSET).astype(jnp.bfloat16)[:, None], shape)
