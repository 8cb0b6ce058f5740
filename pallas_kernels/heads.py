"""A token's heads inside a Pallas kernel: from the qkv product to what attention and the cache take."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Bool, Float, Int32

from lmdeploy_jax.pallas_kernels.norm.pallas import inverse_rms, weigh
from lmdeploy_jax.pallas_kernels.quant_pages import QuantPages, quantised

PagesRef = jax.Ref | QuantPages
"""K or V of a cache within a kernel; `QuantPages` have refs for arrays."""


@dataclass(frozen=True)
class HeadRefs:
    """The qkv product, f32 or whole [S, T, KH, G + 2, D], and the arrays of a `HeadWork`."""

    parts: jax.Ref
    bias: jax.Ref | None
    q_norm: jax.Ref | None
    k_norm: jax.Ref | None
    cos: jax.Ref | None
    sin: jax.Ref | None
    mean_squares: jax.Ref | None


@dataclass(frozen=True)
class HeadTile:
    """One token's heads of one KV head, [rows, D padded]: query heads, then a row for the token's k or v.

    They are rounded to `dtype` where the operations of the XLA path round.
    """

    refs: HeadRefs
    token: jax.Array
    kv_head: jax.Array
    dtype: jnp.dtype
    eps: float
    offset: float
    coded: bool = False
    """Whether the cache is quantised."""

    @property
    def group(self) -> int:
        """Query heads, and the number of the token's row."""
        return self.refs.parts.shape[3] - 2

    @property
    def head_dim(self) -> int:
        return self.refs.parts.shape[4]

    @property
    def row(self) -> jax.Array:
        return jnp.arange(pl.next_power_of_2(self.group + 1), dtype=jnp.int32)[:, None]

    @property
    def column(self) -> jax.Array:
        return jnp.arange(pl.next_power_of_2(self.head_dim), dtype=jnp.int32)[None, :]

    @property
    def value_row(self) -> int:
        """That of v: the key's, or the one behind it, where both are rounded at once and the tile has one."""
        behind = self.group + 1
        return behind if self.coded and behind < self.row.size else self.group

    @property
    def is_query(self) -> jax.Array:
        """Which elements are those of query heads."""
        return (self.row < self.group) & (self.column < self.head_dim)

    def rotated(self) -> Float[Array, "rows D"]:
        """q in the query heads' rows and k in the token's, with bias, norm and rotation."""
        plain = self._queries_and_key(self.column)
        scale = inverse_rms(plain.astype(jnp.float32), self.head_dim, self.eps)
        heads = self._norm(scale, plain, self.column)
        cos_ref, sin_ref = self.refs.cos, self.refs.sin
        if cos_ref is None or sin_ref is None:
            return heads
        partner = partner_of(self.column, cos_ref.shape[1])
        partners = self._norm(scale, self._queries_and_key(partner), partner)
        return self._rotate(heads, partners, cos_ref, sin_ref)

    def values(self) -> Float[Array, "rows D"]:
        """v in its row, with its bias."""
        above = self.group + 1 - self.value_row
        return self._read(self.row + above, self.column, self.row == self.value_row)

    def write(
        self,
        rotated: Float[Array, "rows D"],
        values: Float[Array, "rows D"],
        k_pages: PagesRef,
        v_pages: PagesRef,
        slot: Int32[Array, ""],
        enabled: Bool[Array, ""] | bool = True,
    ) -> None:
        """k and v into a slot of the cache [pages, KH, P, D], unless it is negative or not `enabled`."""
        if self.value_row != self.group:  # of two roundings that are alike the compiler makes one
            rotated = values = jnp.where(self.row == self.value_row, values, rotated)
        page_size = k_pages.shape[2]
        # Only the token's row is stored. The others get slots of their own, since interpret mode writes
        # masked elements back.
        place = lax.rem(slot + page_size + self.row - self.group, page_size)
        mask = (self.row == self.group) & (self.column < self.head_dim) & (slot >= 0) & enabled
        page = lax.div(slot, page_size)
        for pages, heads, row in ((k_pages, rotated, self.group), (v_pages, values, self.value_row)):
            if isinstance(pages, QuantPages):
                self._write_quantised(pages, quantised(heads, pages.format), row, slot, enabled)
                continue
            at = pages.at[page, self.kv_head, place, self.column]
            plt.store(at, heads.astype(pages.dtype), mask=mask)

    def _write_quantised(
        self,
        pages: QuantPages,
        rows: QuantPages,
        own: int,
        slot: Int32[Array, ""],
        enabled: Bool[Array, ""] | bool,
    ) -> None:
        """As `write` does, of row `own` of the tile as the cache holds it."""
        page_size, words = pages.words.shape[2:]
        row = jnp.arange(rows.scales.size, dtype=jnp.int32)
        place = lax.rem(slot + page_size + row - own, page_size)
        mask = (row == own) & (slot >= 0) & enabled
        at = lax.div(slot, page_size), self.kv_head
        plt.store(pages.scales.at[*at, place], rows.scales, mask=mask)
        column = jnp.arange(words, dtype=jnp.int32)[None, :]
        mask = jnp.broadcast_to(mask[:, None], rows.words.shape)
        plt.store(pages.words.at[*at, place[:, None], column], rows.words, mask=mask)

    def _queries_and_key(self, column: jax.Array) -> jax.Array:
        return self._read(self.row, column, self.row <= self.group)

    def _read(self, row: jax.Array, column: jax.Array, row_mask: jax.Array) -> jax.Array:
        """Rows of the qkv product with their bias."""
        mask = row_mask & (self.column < self.head_dim)
        parts = [
            plt.load(self.refs.parts.at[part, self.token, self.kv_head, row, column], mask=mask, other=0)
            for part in range(self.refs.parts.shape[0])
        ]
        heads = self._scaled(sum(parts[1:], parts[0])).astype(self.dtype)
        if self.refs.bias is None:
            return heads
        bias = plt.load(self.refs.bias.at[self.kv_head, row, column], mask=mask, other=0)
        return (heads.astype(jnp.float32) + bias.astype(jnp.float32)).astype(self.dtype)

    def _scaled(self, heads: jax.Array) -> jax.Array:
        """By the norm before the product, where that is left to its reader."""
        ref = self.refs.mean_squares
        if ref is None:
            return heads
        return heads * lax.rsqrt(sum((ref[part] for part in range(1, ref.shape[0])), ref[0]))

    def _norm(self, scale: jax.Array, heads: jax.Array, column: jax.Array) -> jax.Array:
        q_ref, k_ref = self.refs.q_norm, self.refs.k_norm
        if q_ref is None or k_ref is None:
            return heads
        inside = self.column < self.head_dim
        q_weight, k_weight = (plt.load(ref.at[column], mask=inside, other=0) for ref in (q_ref, k_ref))
        weight = jnp.where(self.row < self.group, q_weight, k_weight)
        return weigh(heads.astype(jnp.float32) * scale, weight, self.offset, heads.dtype)

    def _rotate(self, heads: jax.Array, partners: jax.Array, cos_ref: jax.Ref, sin_ref: jax.Ref) -> jax.Array:
        half, column = cos_ref.shape[1], self.column
        first = column < half
        # As wide as the heads: the compiler would bring those into the layout of a single row.
        angle = jnp.broadcast_to(jnp.where(first, column, column - half), heads.shape)
        rotates = (column < 2 * half) & (self.row <= self.group)
        cos = plt.load(cos_ref.at[self.token, angle], mask=rotates, other=1.0)
        sin = plt.load(sin_ref.at[self.token, angle], mask=rotates, other=0.0)
        sin = jnp.where(first, -sin, sin)
        return (heads.astype(jnp.float32) * cos + partners.astype(jnp.float32) * sin).astype(heads.dtype)


def partner_of(column: Int32[Array, "..."], half: int) -> Int32[Array, "..."]:
    """The element that each one is rotated with; itself where nothing rotates."""
    return jnp.where(column < half, column + half, jnp.where(column < 2 * half, column - half, column))
