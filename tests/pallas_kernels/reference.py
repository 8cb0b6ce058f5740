"""A paged batch with a ragged set of sequences, and attention over it as a full softmax in numpy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from lmdeploy_jax.pallas_kernels.kv_formats import KVFormat
from lmdeploy_jax.pallas_kernels.options import PAGE_SIZE, AttentionOptions
from lmdeploy_jax.pallas_kernels.prefill_attention import build_tiles, max_tiles, tile_rows
from lmdeploy_jax.pallas_kernels.quant_pages import QuantPages
from lmdeploy_jax.pallas_kernels.rope_kv_write import HeadWork
from tests.pallas_kernels import kv_reference

LENGTHS = (
    0,
    1,
    63,
    64,
    65,
    200,
    0,
    33,
    130,
    17,
    64,
    5,
    0,
    100,
    2,
    128,
    129,
    90,
    7,
)  # two groups of the XLA path


@dataclass(frozen=True)
class Shape:
    """A test case: head counts, dtype and the options of the attention op."""

    name: str
    group: int = 2
    kv_heads: int = 2
    head_dim: int = 32
    dtype: str = "float32"
    lengths: tuple[int, ...] = LENGTHS
    options: dict[str, float] = field(default_factory=dict)
    sinks: bool = False
    form: KVFormat | None = None
    """How the cache is quantised."""
    block: int | None = None
    """Prefill: tokens `i * block .. (i + 1) * block` of a sequence attend both ways, for odd i."""

    def __str__(self) -> str:
        return self.name


class PagedBatch:
    """Sequences of the given lengths in a cache where every slot that holds no token is `unused`."""

    def __init__(self, shape: Shape, unused: float = np.nan) -> None:
        self.shape, self.rng = shape, np.random.default_rng(0)
        sequences, pages = len(shape.lengths), -(-max(shape.lengths) // PAGE_SIZE)
        self.lengths = np.asarray(shape.lengths, np.int32)
        used = np.arange(pages) * PAGE_SIZE < self.lengths[:, None]
        order = 1 + self.rng.permutation(sequences * pages).reshape(sequences, pages)
        self.table = np.where(used, order, 0).astype(np.int32)
        cache = (sequences * pages + 1, shape.kv_heads, PAGE_SIZE, shape.head_dim)
        self.k_pages, self.v_pages = (np.full(cache, unused, np.float32) for _ in range(2))
        self.drawn = [[self._sequence(n) for n in shape.lengths] for _ in range(2)]
        self.keys, self.values = ([self._kept(x) for x in each] for each in self.drawn)
        for row in range(sequences):
            self._fill(self.k_pages, self.drawn[0][row], row)
            self._fill(self.v_pages, self.drawn[1][row], row)
        self.sinks = self.draw(shape.kv_heads * shape.group) if shape.sinks else None

    def draw(self, *size: int) -> np.ndarray:
        """Normal numbers, exact in the case's dtype."""
        values = self.rng.standard_normal(size).astype(jnp.dtype(self.shape.dtype))
        return values.astype(np.float32)

    def queries(self, rows: int) -> np.ndarray:
        """[rows, H, D]."""
        return self.draw(rows, self.shape.kv_heads * self.shape.group, self.shape.head_dim)

    def chunks(self) -> tuple[list[int], np.ndarray, list[int], list[int]]:
        """A chunk that ends each live sequence: (rows, starts, counts, positions); row 0 stays free."""
        rows = [row for row, length in enumerate(self.shape.lengths) if length]
        counts = [int(self.rng.integers(1, self.shape.lengths[row] + 1)) for row in rows]
        counts[-1] = 1  # a decode row among the chunks
        positions = [self.shape.lengths[row] - count for row, count in zip(rows, counts, strict=True)]
        return rows, 1 + np.cumsum([0, *counts[:-1]]), counts, positions

    def reference(self, q: np.ndarray, row: int, position: int) -> np.ndarray:
        """Full softmax of q [H, D] at `position` of sequence `row` -> [H, D]."""
        return np.stack([self._head(q[head], row, position, head) for head in range(q.shape[0])])

    def lookahead(self, row: int, position: int) -> int:
        """How many keys after its own a query of prefill attention sees: those of its block."""
        block = self.shape.block
        if block is None or position // block % 2 == 0:
            return 0
        return min((position // block + 1) * block, self.shape.lengths[row]) - 1 - position

    def qkv(self, q: np.ndarray) -> np.ndarray:
        """q [S, H, D] with k and v of each sequence's newest token -> [S, KH, G + 2, D]."""
        heads = q.reshape(len(q), self.shape.kv_heads, self.shape.group, self.shape.head_dim)
        newest = [
            [tokens[-1] if len(tokens) else np.zeros_like(heads[0, :, 0]) for tokens in cached]
            for cached in self.drawn
        ]
        return np.concatenate([heads, *(np.stack(tokens)[:, :, None] for tokens in newest)], axis=2)

    def newest_slots(self) -> np.ndarray:
        """Where each sequence's newest token is; in padding rows what pads, by turns 0 and -1."""
        positions = np.maximum(self.lengths - 1, 0)
        pages = np.take_along_axis(self.table, positions[:, None] // PAGE_SIZE, axis=1)[:, 0]
        padding = -(np.arange(len(positions)) % 2)
        return np.where(self.lengths, pages * PAGE_SIZE + positions % PAGE_SIZE, padding).astype(np.int32)

    def without(self, pages: np.ndarray, slots: np.ndarray) -> np.ndarray:
        """The cache with NaN in those slots."""
        pages = pages.copy()
        pages[slots // PAGE_SIZE, :, slots % PAGE_SIZE] = np.nan
        return pages

    def device(self, *arrays: np.ndarray) -> list[jax.Array]:
        """Float arrays in the case's dtype, the others as they are."""
        return [jnp.asarray(x, self.shape.dtype if x.dtype == np.float32 else x.dtype) for x in arrays]

    def cache(self, *pages: np.ndarray) -> list[jax.Array] | list[QuantPages]:
        """Those arrays as the ops take them. Quantised, slots without a token have all bits set: NaN, or an
        absurd number.
        """
        form = self.shape.form
        if form is None:
            return self.device(*pages)
        return [QuantPages(*map(jnp.asarray, kv_reference.pages_of(x, form)), form) for x in pages]

    def _kept(self, tokens: np.ndarray) -> np.ndarray:
        form = self.shape.form
        return tokens if form is None else kv_reference.rounded(tokens, form).astype(np.float32)

    def _sequence(self, length: int) -> np.ndarray:
        return self.draw(length, self.shape.kv_heads, self.shape.head_dim)

    def _fill(self, pages: np.ndarray, tokens: np.ndarray, row: int) -> None:
        for position, token in enumerate(tokens):
            pages[self.table[row, position // PAGE_SIZE], :, position % PAGE_SIZE] = token

    def _head(self, q: np.ndarray, row: int, position: int, head: int) -> np.ndarray:
        options, kv_head = self.shape.options, head // self.shape.group
        first = max(position + 1 - options["window"], 0) if "window" in options else 0
        first = position // options["chunk"] * options["chunk"] if "chunk" in options else first
        stop = position + 1 + self.lookahead(row, position)
        logits = self.keys[row][first:stop, kv_head].astype(np.float64) @ q * options["scale"]
        if "soft_cap" in options:
            logits = options["soft_cap"] * np.tanh(logits / options["soft_cap"])
        weights = np.exp(logits)
        denominator = weights.sum() + (0 if self.sinks is None else np.exp(self.sinks[head]))
        return weights @ self.values[row][first:stop, kv_head] / denominator


def decode_case(
    op: Callable[..., tuple[jax.Array, ...]], batch: PagedBatch, backend: str
) -> tuple[np.ndarray, np.ndarray]:
    """(output, reference) of decode attention, which puts the newest tokens into the cache itself."""
    shape = batch.shape
    q = batch.queries(len(batch.lengths))
    slots, qkv = batch.newest_slots(), batch.qkv(q)
    before = [batch.without(pages, slots) for pages in (batch.k_pages, batch.v_pages)]
    zeros = np.zeros((len(batch.lengths), shape.kv_heads), np.int32)
    attend = _jitted(op, batch, backend, work=HeadWork(), dtype=shape.dtype)
    rest = (slots, batch.table, batch.lengths)
    new, where = batch.device(qkv), batch.device(*rest)
    *_, counters = attend(*new, *batch.cache(*before), *where, *batch.device(zeros))
    out, *written, counters = attend(*new, *batch.cache(*before), *where, counters)  # as the next layer does
    assert not np.any(counters), "counters are not zero after a call"
    for pages, complete in zip(written, batch.cache(batch.k_pages, batch.v_pages), strict=True):
        kv_reference.assert_same_pages(pages, complete)
    expected = np.zeros(q.shape)
    for row, length in enumerate(batch.lengths):
        if length:
            expected[row] = batch.reference(q[row], row, length - 1)
    return np.asarray(out, np.float64).reshape(q.shape), expected


def prefill_case(
    op: Callable[..., jax.Array], batch: PagedBatch, backend: str
) -> tuple[np.ndarray, np.ndarray]:
    """(output, reference) of prefill attention over the batch; no tile covers the first and last rows."""
    rows, starts, counts, positions = batch.chunks()
    tokens = sum(counts) + 7
    q = batch.queries(tokens)
    width = max_tiles(tokens, len(batch.lengths), tile_rows(backend))
    tiles = build_tiles(rows, starts, counts, positions, tile_rows(backend), width)
    more: dict[str, object] = {}
    if batch.shape.block is not None:
        ahead = np.zeros(tokens, np.int32)
        for row, start, count, position in zip(rows, starts, counts, positions, strict=True):
            ahead[start : start + count] = [batch.lookahead(row, position + i) for i in range(count)]
        more["lookahead"] = jnp.asarray(ahead)
    cache = batch.cache(batch.k_pages, batch.v_pages)
    arrays = [*batch.device(q), *cache, *batch.device(batch.table, tiles)]
    out = _jitted(op, batch, backend, **more)(*arrays)
    expected = np.zeros(q.shape)
    for row, start, count, position in zip(rows, starts, counts, positions, strict=True):
        for i in range(count):
            expected[start + i] = batch.reference(q[start + i], row, position + i)
    got = np.array(out, np.float64)
    unseen = np.all(expected == 0, axis=(1, 2))
    assert np.isfinite(got[unseen]).all(), "rows that no tile covers hold what would spread"
    got[unseen] = 0
    return got, expected


def relative_error(out: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(out - expected) / np.linalg.norm(expected))


def _jitted(
    op: Callable[..., jax.Array], batch: PagedBatch, backend: str, **more: object
) -> Callable[..., jax.Array]:
    sinks = None if batch.sinks is None else jnp.asarray(batch.sinks)
    options = AttentionOptions(**batch.shape.options)
    return jax.jit(lambda *arrays: op(*arrays, options=options, **more, sinks=sinks, backend=backend))
