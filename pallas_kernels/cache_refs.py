"""A paged cache inside a Pallas kernel: how its pages are read and attended to, plain and quantised."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Bool, Float, Float16, Float32, Int32, UInt16

from lmdeploy_jax.pallas_kernels.blocks import (
    AddValues,
    attend_logits,
    attend_page,
    dot,
    initial_state,
    load_page,
    page_parts,
    scale_output,
    tokens_of,
)
from lmdeploy_jax.pallas_kernels.kv_formats import KVFormat
from lmdeploy_jax.pallas_kernels.options import AttentionOptions
from lmdeploy_jax.pallas_kernels.quant_pages import MAX_FLOAT16, QuantPages, code, split_scales
from lmdeploy_jax.pallas_kernels.shapes import Output, Row, Softmax

Index = Int32[Array, ""]
Visible = Callable[[Int32[Array, "P"]], Bool[Array, "#N P"]]
"""Which tokens of a page, by their numbers in it, a row sees; asked once their loads are on their way."""
Blocks = Sequence[Float[Array, "N columns"]]
"""Rows by `CacheRefs.columns`."""


class Queries(NamedTuple):
    """A block's rows by columns, and the sum of each row where keys have zero points."""

    blocks: tuple[Float[Array, "N columns"], ...]
    totals: Row | None = None


class CacheRefs(Protocol):
    """K and V of a cache, [pages, KH, P, D] each. The columns of a head come in blocks, one or more."""

    page_size: int

    @property
    def columns(self) -> tuple[Int32[Array, "1 columns"], ...]:
        """Those of each block; maybe beyond the head's last."""

    def queries(self, rows: Blocks) -> Queries:
        """The rows that attend."""

    def initial(self, rows: int) -> Softmax:
        """The state of a softmax over no keys, as `attend` takes it."""

    def attend(
        self,
        state: Softmax,
        q: Queries,
        page: Index,
        head: Index,
        valid: Index | None,
        visible: Visible | None,
        options: AttentionOptions,
    ) -> Softmax:
        """Adds a page, of which `valid` tokens count (None: all), as `attend_page` does."""

    def finished(self, state: Softmax) -> Softmax:
        """The state with its output, a block of columns each."""


def cache_refs(pages: tuple[Any, Any], interpret: bool) -> CacheRefs:
    """Of K and V: refs, or `QuantPages` that have refs for arrays."""
    return (QuantRefs if isinstance(pages[0], QuantPages) else PlainRefs)(*pages, interpret)


class PlainRefs:
    """A cache of floats."""

    def __init__(self, k_ref: jax.Ref, v_ref: jax.Ref, interpret: bool) -> None:
        self.k, self.v = k_ref, v_ref
        self.page_size, head_dim = k_ref.shape[2:]
        self.width = pl.next_power_of_2(head_dim)  # Triton's blocks have no other sizes

    @property
    def columns(self) -> tuple[Int32[Array, "1 columns"], ...]:
        return (jnp.arange(self.width, dtype=jnp.int32)[None, :],)

    def queries(self, rows: Blocks) -> Queries:
        return Queries((rows[0].astype(self.k.dtype),))

    def initial(self, rows: int) -> Softmax:
        return initial_state(rows, self.width)

    def attend(
        self,
        state: Softmax,
        q: Queries,
        page: Index,
        head: Index,
        valid: Index | None,
        visible: Visible | None,
        options: AttentionOptions,
    ) -> Softmax:
        for part in page_parts(self.k):
            keys, values = (
                load_page(self.k, page, head, part),
                load_page(self.v, page, head, part, valid),
            )
            seen = visible and visible(tokens_of(part))
            state = attend_page(state, q.blocks[0], keys, values, seen, options)
        return state

    def finished(self, state: Softmax) -> Softmax:
        return state


@dataclass(frozen=True)
class _Page:
    """A head's page: its words, and of each token scale and zero point."""

    words: UInt16[Array, "P words"]
    scales: Row
    zeros: Row | None


class QuantRefs:
    """A quantised cache. Codes become float16, which holds them exactly. No element is dequantised: scales
    multiply the logits of keys, and the weights of values; zero points are taken from either product by way
    of the sum of what was multiplied with the codes.
    """

    def __init__(self, k: QuantPages, v: QuantPages, interpret: bool) -> None:
        self.k, self.v, self.form, self.interpret = k, v, k.format, interpret
        self.page_size, self.words = k.words.shape[2:]

    @property
    def columns(self) -> tuple[Int32[Array, "1 columns"], ...]:
        column = jnp.arange(self.words, dtype=jnp.int32)[None, :]
        return tuple(column + i * self.words for i in range(self.form.per_word))

    def queries(self, rows: Blocks) -> Queries:
        wide = (block.astype(jnp.float32) for block in rows)
        blocks = tuple(
            jnp.minimum(jnp.maximum(block, -MAX_FLOAT16), MAX_FLOAT16).astype(jnp.float16) for block in wide
        )
        if self.form.is_float:
            return Queries(blocks)
        totals = [jnp.sum(block.astype(jnp.float32), axis=1) for block in blocks]
        return Queries(blocks, sum(totals[1:], totals[0]))

    def initial(self, rows: int) -> Softmax:
        maximum, denominator, out = initial_state(rows, self.words)
        return maximum, denominator, (out,) * self.form.per_word

    def attend(
        self,
        state: Softmax,
        q: Queries,
        page: Index,
        head: Index,
        valid: Index | None,
        visible: Visible | None,
        options: AttentionOptions,
    ) -> Softmax:
        keys, values = self._load(self.k, page, head, None), self._load(self.v, page, head, valid)
        products = [dot(block, self._code(keys.words, i).T) for i, block in enumerate(q.blocks)]
        logits = sum(products[1:], products[0])
        if keys.zeros is not None and q.totals is not None:
            logits = logits - q.totals[:, None] * keys.zeros[None, :]
        seen = visible and visible(jnp.arange(self.page_size, dtype=jnp.int32))
        return attend_logits(state, logits, self._adder(values), seen, options, keys.scales)

    def finished(self, state: Softmax) -> Softmax:
        maximum, denominator, out = state
        return maximum, denominator, scale_output(out, jnp.float32(1 / self.form.gain))

    def widened(self, pages: QuantPages, page: Index, head: Index) -> list[Float32[Array, "P words"]]:
        """The numbers of K's or V's page by columns; 0 where there is none, as unused slots may have it."""
        held = self._load(pages, page, head, None)
        blocks = [self._code(held.words, i).astype(jnp.float32) for i in range(self.form.per_word)]
        if held.zeros is not None:
            blocks = [block - held.zeros[:, None] for block in blocks]
        values = [block * held.scales[:, None] for block in blocks]
        return [jnp.where(jnp.abs(x) < jnp.inf, x, 0.0) for x in values]

    def _load(self, pages: QuantPages, page: Index, head: Index, valid: Index | None) -> _Page:
        """What scales an unused slot holds never counts: its weight would be 0, but times NaN."""
        words = pages.words[page, head]
        if valid is None:
            return _Page(words, *split_scales(pages.scales[page, head], self.form))
        token = jnp.arange(self.page_size, dtype=jnp.int32)
        scales = plt.load(pages.scales.at[page, head, token], mask=token < valid, other=0)
        return _Page(words, *split_scales(scales, self.form))

    def _adder(self, values: _Page) -> AddValues:
        def add(weights: Float32[Array, "N P"], out: Output) -> Output:
            scales = jnp.minimum(values.scales * self.form.gain, MAX_FLOAT16)
            rounded = (weights * scales[None, :]).astype(jnp.float16)
            if values.zeros is not None:
                shift = jnp.sum(rounded.astype(jnp.float32) * values.zeros[None, :], axis=1)
                out = tuple(block - shift[:, None] for block in out)
            return tuple(block + dot(rounded, self._code(values.words, i)) for i, block in enumerate(out))

        return add

    def _code(self, words: UInt16[Array, "P words"], number: int) -> Float16[Array, "P words"]:
        """As `code`, by assembly, two words at a time: Triton would widen 16-bit integers one by one."""
        if self.interpret:
            return code(words, number, self.form)
        (out,) = plt.elementwise_inline_asm(
            "{ .reg .b32 t, u; " + _assembly(self.form, number) + " }",
            args=[words],
            constraints="=r,r",
            pack=2,
            result_shape_dtypes=[jax.ShapeDtypeStruct(words.shape, jnp.float16)],
        )
        return out


def _assembly(form: KVFormat, number: int) -> str:
    """The code's bits as those of a float16: PTX from `$1`, two words, to `$0`."""
    if form.mantissa == 2:
        return ("prmt.b32 $0, $1, 0, 0x2404;", "and.b32 $0, $1, 0xff00ff00;")[number]
    if form.mantissa == 3:
        low = "shl.b32 t, $1, 7; shl.b32 u, $1, 8;", "shr.b32 t, $1, 1; mov.b32 u, $1;"
        return low[number] + " and.b32 t, t, 0x3f803f80; lop3.b32 $0, u, 0x80008000, t, 0xea;"
    if form.bits == 8:
        return f"prmt.b32 $0, $1, 0x64646464, {('0x4240', '0x4341')[number]};"
    return f"shr.b32 t, $1, {4 * number}; lop3.b32 $0, t, 0x000f000f, 0x64006400, 0xea;"
