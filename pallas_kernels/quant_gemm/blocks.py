"""Blocks of quantised weights within a kernel: read, multiplied as they are, scaled by group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as plt
from jax.typing import DTypeLike
from jaxtyping import Array, BFloat16, Float, Float32, Int32, Shaped, UInt8, UInt16

from lmdeploy_jax.pallas_kernels.blocks import dot
from lmdeploy_jax.pallas_kernels.quant_gemm.words import PER_WORD, TILE
from lmdeploy_jax.pallas_kernels.round_rows.pallas import rounded
from lmdeploy_jax.pallas_kernels.round_rows.xla import LEAST, limit
from lmdeploy_jax.pallas_kernels.skinny_gemm.pallas import WeightTile
from lmdeploy_jax.pallas_kernels.skinny_gemm.tiling import Tiling

QUARTER = TILE // PER_WORD  # columns of a tile that have the same nibble of their words
OFFSET = 128  # bfloat16's last bit is 1 from here on: the nibble becomes the end of such a number
FLOATS = {"float8_e4m3fn": (4, 120), "float8_e5m2": (3, 112)}
"""Bits that a float's exponent lacks; and, read as bfloat16's, the power of two by which they mean less."""
LIFTED = 100  # power of two that activations are multiplied by meanwhile, so that no product is subnormal
Index = Int32[Array, ""]
Totals = list[Shaped[Array, "out rows"]]  # f32, or int32 of int8 times int8


@dataclass(frozen=True)
class Refs:
    """x [T, K], with its scales [G, T] if it has 8 bits; the weight's values [halves, N, K], scales and zeros
    [G, halves, N].
    """

    x: jax.Ref
    x_scales: jax.Ref | None
    values: jax.Ref
    scales: jax.Ref
    zeros: jax.Ref | None

    @property
    def halves(self) -> range:
        return range(self.values.shape[0])

    @property
    def groups(self) -> int:
        return self.scales.shape[0]

    @property
    def width(self) -> int:
        """Columns of a group."""
        return self.x.shape[1] // self.groups


class Blocks(Protocol):
    """The sums of a program, over blocks of columns."""

    def zeros(self) -> Totals:
        """One of each half."""

    def add(self, totals: Totals, block: Index) -> Totals:
        """Adds the products of block number `block` of the columns."""

    def scaled(self, totals: Totals) -> Totals:
        """The sums of all blocks, in f32."""


class EightBits:
    """Weights of 8 bits. With one group, its scales are those of the sums.

    Activations have 8 bits too, or come in 16: then they are rounded on the way, a block of columns with a
    scale for each row, or the weight is widened on the way.
    """

    def __init__(self, tile: WeightTile, refs: Refs, tiling: Tiling, interpret: bool) -> None:
        self.tile, self.refs, self.interpret = tile, refs, interpret
        self.rounds, self.widens = tiling.rounds, tiling.widens
        self.whole, self.given = refs.groups == 1, refs.x_scales is not None
        name = refs.values.dtype.name
        self.power = FLOATS[name][1] - LIFTED if tiling.widens and name in FLOATS else None

    def zeros(self) -> Totals:
        exact = self.whole and self.given and self.refs.values.dtype == jnp.int8
        zeros = jnp.zeros(self.tile.mask.shape, jnp.int32 if exact else jnp.float32)
        return [zeros for _ in self.refs.halves]

    def add(self, totals: Totals, block: Index) -> Totals:
        inner = block * self.tile.block_in
        x = self.tile.x(self.refs.x, inner)
        if not self.given:
            return self.add_row(totals, block, x)
        rows = None if self.whole else self._rows(lax.div(inner, self.refs.width))
        return self._add(totals, inner, x, rows)

    def add_row(self, totals: Totals, block: Index, x: Float[Array, "#rows columns"]) -> Totals:
        """The same, with a block of activations of 16 bits, or of one row in f32 for all."""
        rows = None
        if self.rounds:
            x, rows = rounded_block(x, self.refs.values.dtype)
        else:
            x = (x if self.power is None else x * 2.0**LIFTED).astype(self.refs.x.dtype)
        if x.shape[0] < self.tile.token.size:
            x = jnp.broadcast_to(x, (self.tile.token.size, self.tile.block_in))
        return self._add(totals, block * self.tile.block_in, x, rows)

    def scaled(self, totals: Totals) -> Totals:
        if not self.whole:
            return totals
        return self._scaled(totals, self._rows(0) if self.given else None, 0)

    def _add(
        self,
        totals: Totals,
        inner: Index,
        x: Shaped[Array, "rows columns"],
        rows: Float32[Array, "#rows"] | None,
    ) -> Totals:
        """rows: scales of x; None: none, or those of the sums."""
        products = [dot(self._weight(inner, half), x.T) for half in self.refs.halves]
        if not self.whole:
            products = self._scaled(products, rows, lax.div(inner, self.refs.width))
        elif rows is not None:
            products = [product.astype(jnp.float32) * rows[None, :] for product in products]
        return [total + product for total, product in zip(totals, products, strict=True)]

    def _weight(self, inner: Index, half: int) -> Shaped[Array, "out columns"]:
        weight = self.tile.read(self.refs.values, inner, half)
        if self.power is not None:
            return widened(weight, self.interpret)
        return weight.astype(self.refs.x.dtype) if self.widens else weight

    def _rows(self, group: Index | int) -> Float32[Array, "rows"]:
        """Scales that came with the activations."""
        assert self.refs.x_scales is not None
        token = self.tile.token
        return plt.load(self.refs.x_scales.at[group, token], mask=token < self.tile.tokens, other=0)

    def _scaled(
        self, sums: list[jax.Array], rows: Float32[Array, "#rows"] | None, group: Index | int
    ) -> Totals:
        scales = [of_outputs(self.tile, self.refs.scales, group, half)[:, None] for half in self.refs.halves]
        if self.power is not None:
            scales = [scale * 2.0**self.power for scale in scales]
        factors = scales if rows is None else [scale * rows[None, :] for scale in scales]
        return [total.astype(jnp.float32) * factor for total, factor in zip(sums, factors, strict=True)]


class FourBits:
    """Weights of 4 bits, each less its zero in bfloat16, which is exact, times activations of 16 bits."""

    def __init__(self, tile: WeightTile, refs: Refs, interpret: bool) -> None:
        self.tile, self.refs, self.interpret = tile, refs, interpret
        self.whole = refs.groups == 1

    def zeros(self) -> Totals:
        return [self.tile.zeros() for _ in self.refs.halves]

    def add(self, totals: Totals, block: Index) -> Totals:
        tiles = self.tile.block_in // TILE
        for number in range(tiles):
            tile = block * tiles + number
            x = [self._x(tile * TILE + quarter * QUARTER) for quarter in range(PER_WORD)]
            totals = [self._add(totals[half], x, tile, half) for half in self.refs.halves]
        return totals

    def scaled(self, totals: Totals) -> Totals:
        if not self.whole:
            return totals
        scales = [of_outputs(self.tile, self.refs.scales, 0, half) for half in self.refs.halves]
        return [total * scale[:, None] for total, scale in zip(totals, scales, strict=True)]

    def _add(self, total: jax.Array, x: list[jax.Array], tile: Index, half: int) -> jax.Array:
        """The products of one tile of columns."""
        words, width = self._words(tile, half), min(self.refs.width, TILE)
        for first in range(0, TILE, width):
            group = lax.div(tile * TILE + first, self.refs.width)
            zero = self._zero(group, half)
            quarters = range(first // QUARTER, (first + width) // QUARTER)
            products = sum(dot(unpacked(words, q, zero, self.interpret), x[q]) for q in quarters)
            if self.whole:
                total += products
            else:
                total += products * of_outputs(self.tile, self.refs.scales, group, half)[:, None]
        return total

    def _x(self, inner: Index) -> Shaped[Array, "columns rows"]:
        tile, column = self.tile, inner + jnp.arange(QUARTER, dtype=jnp.int32)
        inside = jnp.broadcast_to((tile.token < tile.tokens)[:, None], (tile.token.size, QUARTER))
        return plt.load(self.refs.x.at[tile.token[:, None], column[None, :]], mask=inside, other=0).T

    def _words(self, number: Index, half: int) -> UInt16[Array, "out columns"]:
        """Those of tile `number`, of which Triton has to see that 16 bytes lie together: no quotients."""
        tile = self.tile
        column = number * QUARTER + jnp.arange(QUARTER, dtype=jnp.int32)
        at = self.refs.values.at[half, tile.out[:, None], column[None, :]]
        if tile.in_bounds:
            return plt.load(at)
        inside = jnp.broadcast_to((tile.out < tile.outputs)[:, None], (tile.out.size, QUARTER))
        return plt.load(at, mask=inside, other=0)

    def _zero(self, group: Index, half: int) -> BFloat16[Array, "out columns"]:
        """What is taken from a nibble at the end of OFFSET."""
        shape = (self.tile.out.size, QUARTER)
        if self.refs.zeros is None:
            return jnp.full(shape, OFFSET + 8, jnp.bfloat16)
        zeros = of_outputs(self.tile, self.refs.zeros, 0 if self.whole else group, half)
        return jnp.broadcast_to((zeros + OFFSET).astype(jnp.bfloat16)[:, None], shape)


def of_outputs(tile: WeightTile, ref: jax.Ref, group: Index | int, half: int) -> Float32[Array, "out"]:
    """A group's row of an array [G, halves, N]."""
    at = ref.at[group, half, tile.out]
    row = plt.load(at) if tile.in_bounds else plt.load(at, mask=tile.out < tile.outputs, other=0)
    return row.astype(jnp.float32)


def rounded_block(
    x: Float[Array, "rows columns"], dtype: DTypeLike
) -> tuple[Shaped[Array, "rows columns"], Float32[Array, "rows"]]:
    """As `round_rows` has it, of one group."""
    wide = x.astype(jnp.float32)
    scales = jnp.maximum(jnp.max(jnp.abs(wide), axis=1), LEAST) / limit(dtype)
    return rounded(wide / scales[:, None], dtype), scales


def widened(weight: Shaped[Array, "out columns"], interpret: bool) -> BFloat16[Array, "out columns"]:
    """Floats of 8 bits times the power of two in `FLOATS`; Triton would go over f32, an element at a time."""
    bits, _ = FLOATS[weight.dtype.name]
    mask = 0x7F00 >> bits
    if interpret:
        byte = lax.bitcast_convert_type(weight, jnp.uint8).astype(jnp.uint16)
        wide = (byte & 0x80) << 8 | (byte << (8 - bits)) & jnp.uint16(mask)
        return lax.bitcast_convert_type(wide, jnp.bfloat16)
    shape = jax.ShapeDtypeStruct(weight.shape, jnp.bfloat16)
    lines = [
        f"prmt.b32 t, $2, 0, {order}; shr.u32 m, t, {bits}; and.b32 m, m, {mask << 16 | mask}; "
        f"lop3.b32 ${out}, t, 0x80008000, m, 0xea;"  # the sign, and m
        for out, order in enumerate(("0x1404", "0x3424"))
    ]
    text = "{ .reg .b32 t, m; " + " ".join(lines) + " }"
    (found,) = plt.elementwise_inline_asm(
        text, args=[weight], constraints="=r,=r,r", pack=4, result_shape_dtypes=[shape]
    )
    return found


def unpacked(
    words: UInt16[Array, "out columns"], quarter: int, zero: BFloat16[Array, "out columns"], interpret: bool
) -> BFloat16[Array, "out columns"]:
    """Nibble number `quarter` of each word, less its zero.

    By assembly, two words at a time: Triton would widen 16-bit integers one by one. Interpreted kernels do
    the same to the same bits.
    """
    if interpret:
        bits = (words >> jnp.uint16(4 * quarter)) & jnp.uint16(15) | jnp.uint16(0x4300)
        return lax.bitcast_convert_type(bits, jnp.bfloat16) - zero
    shape = jax.ShapeDtypeStruct(words.shape, jnp.bfloat16)
    nibble = f"shr.u32 t, $1, {4 * quarter}; lop3.b32 t, t, 0x000f000f, 0x43004300, 0xea;"
    less = "fma.rn.bf16x2 $0, $2, m, t;"  # zero times -1, and t
    text = "{ .reg .b32 t, m; mov.b32 m, 0xbf80bf80; " + f"{nibble} {less} }}"
    (out,) = plt.elementwise_inline_asm(
        text, args=[words, zero], constraints="=r,r,r", pack=2, result_shape_dtypes=[shape]
    )
    return out


def unpacked_e2m1(
    words: UInt16[Array, "out columns"], quarter: int, interpret: bool
) -> BFloat16[Array, "out columns"]:
    """What nibble number `quarter` of each word stands for as E2M1.

    Its exponent and mantissa become the lowest of a bfloat16's exponent and the highest of its mantissa:
    2^-126 of the number, the subnormal 0.5 too. Interpreted kernels make the same numbers another way, since
    CPUs may take subnormal ones for zeros.
    """
    if interpret:
        code = ((words >> jnp.uint16(4 * quarter)) & jnp.uint16(15)).astype(jnp.int32)
        exponent, mantissa = ((code >> 1) & 3).astype(jnp.float32), (code & 1).astype(jnp.float32)
        size = jnp.where(exponent == 0, mantissa / 2, jnp.exp2(exponent - 1) * (1 + mantissa / 2))
        return jnp.where(code > 7, -size, size).astype(jnp.bfloat16)
    factor = jnp.full(words.shape, 2.0**126, jnp.bfloat16)
    return scaled_e2m1(words, quarter, factor, interpret)


def scaled_e2m1(
    words: UInt16[Array, "out columns"],
    quarter: int,
    factors: BFloat16[Array, "out columns"],
    interpret: bool,
) -> BFloat16[Array, "out columns"]:
    """2^-126 of the same, or in interpreted kernels the same, times factors, which are powers of two."""
    if interpret:
        return unpacked_e2m1(words, quarter, interpret) * factors
    shape = jax.ShapeDtypeStruct(words.shape, jnp.bfloat16)
    text = (
        "{ .reg .b32 t, s, m; "
        f"{_shifted('t', 6 - 4 * quarter)} and.b32 t, t, 0x01c001c0; "
        f"{_shifted('s', 12 - 4 * quarter)} lop3.b32 t, s, 0x80008000, t, 0xea; "
        "mov.b32 m, 0x80008000; fma.rn.bf16x2 $0, t, $2, m; }"  # less 0
    )
    (out,) = plt.elementwise_inline_asm(
        text, args=[words, factors], constraints="=r,r,r", pack=2, result_shape_dtypes=[shape]
    )
    return out


def _shifted(register: str, left: int) -> str:
    """The instruction that shifts two words at once to the left, or to the right."""
    if left == 0:
        return f"mov.b32 {register}, $1;"
    return f"shl.b32 {register}, $1, {left};" if left > 0 else f"shr.u32 {register}, $1, {-left};"


def exponents(scales: UInt8[Array, "*shape"]) -> Float32[Array, "*shape"]:
    """What bytes of E8M0 stand for: a float32's exponent."""
    return lax.bitcast_convert_type(scales.astype(jnp.int32) << 23, jnp.float32)
