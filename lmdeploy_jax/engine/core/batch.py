"""Packing a step into one int32 array on the host, and unpacking it inside the compiled step.

One array means one transfer. Floats travel as their bits. Every call makes a fresh array: a host buffer must
not be rewritten while its copy to the device may still be under way.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence as Seq
from functools import cache
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lmdeploy_jax.cache.pages import DUMP_PAGE, PAGE_SIZE
from lmdeploy_jax.engine.core.scheduler import Chunk
from lmdeploy_jax.engine.request import SamplingParams, Sequence
from lmdeploy_jax.models.batch import AttentionMetadata, Batch
from lmdeploy_jax.pallas_kernels.prefill_attention import build_tiles, max_tiles
from lmdeploy_jax.sampling.params import SamplingBatch

FLOATS = ("temperature", "top_p", "min_p", "repetition", "presence", "frequency")
INTS = ("top_k", "seed", "logprobs")


class Draw(enum.IntEnum):
    """How `steps.decode_any` draws the next tokens."""

    NOT = 0
    GREEDY = 1
    SAMPLE = 2


class Layout:
    """Named int32 fields one after another in a flat array."""

    def __init__(self, **shapes: tuple[int, ...]) -> None:
        self.fields: dict[str, tuple[int, tuple[int, ...]]] = {}
        self.size = 0
        for name, shape in shapes.items():
            self.fields[name] = (self.size, shape)
            self.size += prod(shape)

    def views(self, flat: Any) -> dict[str, Any]:
        """Each field as a view of a numpy array, or as a slice of a traced one."""
        return {
            n: flat[o : o + s[0]] if len(s) == 1 else flat[o : o + prod(s)].reshape(s)
            for n, (o, s) in self.fields.items()
        }

    def empty(self) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        flat = np.zeros(self.size, np.int32)
        return flat, self.views(flat)


class StepPacker:
    """Packs forward passes and sampling calls; keeps a host copy of what belongs to a slot.

    `max_batch_size` slots; slot number `max_batch_size` is the dump slot of padding rows.
    """

    def __init__(self, max_batch_size: int, session_len: int, vocab_size: int, tile_rows: int) -> None:
        self.max_batch_size = max_batch_size
        self.table_width = -(-session_len // PAGE_SIZE)
        self.tile_rows = tile_rows
        self.decode_layout, self.drawing_layout = cache(self._decode_layout), cache(self._drawing_layout)
        self.ragged_layout, self.head_layout = cache(self._ragged_layout), cache(self._head_layout)
        self._vocab_size = vocab_size
        self._tables = np.zeros((max_batch_size + 1, self.table_width), np.int32)
        self._params = {name: np.zeros(max_batch_size + 1, np.int32) for name in (*FLOATS, *INTS)}
        self.set_params(
            max_batch_size, SamplingParams(max_new_tokens=1), seed=0
        )  # padding rows: plain greedy

    # -- layouts ------------------------------------------------------------------------------------------

    def _decode_layout(self, rows: int) -> Layout:
        row = (rows,)
        return Layout(
            slots=row,
            positions=row,  # -1 in padding rows
            page_table=(rows, self.table_width),
        )

    def _drawing_layout(self, rows: int) -> Layout:
        """Of decode steps that draw their own tokens."""
        row, decode = (rows,), self.decode_layout(rows)
        shapes = {name: shape for name, (_, shape) in decode.fields.items()}
        return Layout(
            **shapes,
            draw=(1,),  # how a CPU's step draws: not at all, greedily, by sampling; see `steps.decode_any`
            count=(1,),  # its tokens for each row, one after another
            step=row,
            **dict.fromkeys((*FLOATS, *INTS), row),
        )

    def _ragged_layout(self, tokens: int) -> Layout:
        token, row = (tokens,), (self.max_batch_size,)
        return Layout(
            tokens=token,
            token_slots=token,  # slot whose pending token stands here, -1: `tokens` has it
            positions=token,
            rope_lens=token,
            kv_slots=token,
            kv_lens=row,
            last=row,  # the token whose hidden state predicts the row's next token
            page_table=(self.max_batch_size, self.table_width),
            tiles=(max_tiles(tokens, self.max_batch_size, self.tile_rows), 4),
        )

    def _head_layout(self, rows: int) -> Layout:
        row, flag = (rows,), (1,)
        flags = {"changed": flag, "reshapes": flag}  # see `steps.head_any`
        return Layout(rows=row, slots=row, step=row, **dict.fromkeys((*FLOATS, *INTS), row), **flags)

    # -- host side ----------------------------------------------------------------------------------------

    def set_params(self, slot: int, params: SamplingParams, seed: int) -> None:
        """Keep a sequence's sampling parameters for as long as it holds the slot."""
        floats = (
            params.temperature,
            params.top_p,
            params.min_p,
            params.repetition_penalty,
            params.presence_penalty,
            params.frequency_penalty,
        )
        for name, value in zip(FLOATS, floats, strict=True):
            self._params[name][slot] = np.float32(value).view(np.int32)
        self._params["top_k"][slot] = min(params.top_k, self._vocab_size)
        self._params["logprobs"][slot] = params.logprobs is not None
        self._params["seed"][slot] = np.uint32(seed & 0xFFFFFFFF).view(np.int32)

    def pack_decode(self, chunks: Seq[Chunk], rows: int) -> np.ndarray:
        flat, field = self.decode_layout(rows).empty()
        self._put_decode(field, chunks)
        return flat

    def pack_drawing(self, chunks: Seq[Chunk], rows: int, count: int, draw: Draw = Draw.SAMPLE) -> np.ndarray:
        """A step that draws `count` tokens for each sequence, which count as drawn already."""
        flat, field = self.drawing_layout(rows).empty()
        self._put_decode(field, chunks)
        if draw is Draw.SAMPLE:  # nothing else reads them
            self._put_params(field, [c.sequence.num_generated - count for c in chunks])
        field["draw"][:], field["count"][:] = draw, count
        return flat

    def _put_decode(self, field: dict[str, np.ndarray], chunks: Seq[Chunk]) -> None:
        n, slots = len(chunks), self._slots(chunks)
        field["slots"][:] = self.max_batch_size
        field["slots"][:n] = slots
        field["positions"][:] = -1
        field["positions"][:n] = np.fromiter((c.start for c in chunks), np.int32, n)
        field["page_table"][:n] = self._tables[slots]

    def _put_params(self, field: dict[str, np.ndarray], step: list[int]) -> None:
        field["step"][: len(step)] = step
        for name, values in self._params.items():
            field[name][:] = values[field["slots"]]

    def pack_ragged(self, chunks: Seq[Chunk], tokens: int) -> np.ndarray:
        flat, field = self.ragged_layout(tokens).empty()
        n = len(chunks)
        slots = self._slots(chunks)
        counts = np.fromiter((c.count for c in chunks), np.int32, n)
        starts = np.fromiter((c.start for c in chunks), np.int32, n)
        offsets = np.cumsum(counts) - counts
        total = int(counts.sum())
        positions = np.arange(total, dtype=np.int32) + np.repeat(starts - offsets, counts)
        field["token_slots"][:] = -1
        self._put_tokens(field, chunks, slots, offsets + counts - 1)
        field["positions"][:total] = positions
        lens = np.fromiter((c.sequence.rope_len for c in chunks), np.int32, n)
        field["rope_lens"][:total] = np.maximum(positions + 1, np.repeat(lens, counts))
        field["kv_slots"][:total] = self._kv_slots(np.repeat(slots, counts), positions)
        field["kv_lens"][:n] = starts + counts
        field["last"][:n] = offsets + counts - 1
        field["page_table"][:n] = self._tables[slots]
        field["tiles"][:] = build_tiles(
            np.arange(n, dtype=np.int32), offsets, counts, starts, self.tile_rows, len(field["tiles"])
        )
        return flat

    def pack_head(
        self, drawn: Seq[tuple[Sequence, int]], rows: int, *, changed: bool = False, reshapes: bool = False
    ) -> np.ndarray:
        """`drawn`: sequences with the row of hidden states that each samples from."""
        flat, field = self.head_layout(rows).empty()
        field["changed"][:], field["reshapes"][:] = changed, reshapes
        n = len(drawn)
        field["rows"][:n] = [row for _, row in drawn]
        field["slots"][:] = self.max_batch_size
        field["slots"][:n] = [s.slot for s, _ in drawn]
        self._put_params(field, [s.num_generated - 1 for s, _ in drawn])  # this draw is counted already
        return flat

    def _slots(self, chunks: Seq[Chunk]) -> np.ndarray:
        for chunk in chunks:
            self._sync_table(chunk.sequence)
        return np.fromiter((c.sequence.slot for c in chunks), np.int32, len(chunks))

    def _sync_table(self, sequence: Sequence) -> None:
        known, pages = sequence.table_len, sequence.pages
        if known != len(pages):
            row = self._tables[sequence.slot]
            row[known : len(pages)] = pages[known:]
            row[len(pages) :] = 0
            sequence.table_len = len(pages)

    def _kv_slots(self, slots: np.ndarray, positions: np.ndarray) -> np.ndarray:
        return self._tables[slots, positions // PAGE_SIZE] * PAGE_SIZE + positions % PAGE_SIZE

    def _put_tokens(
        self, field: dict[str, np.ndarray], chunks: Seq[Chunk], slots: np.ndarray, last: np.ndarray
    ) -> None:
        pending = np.fromiter((c.from_device for c in chunks), np.bool_, len(chunks))
        field["token_slots"][last[pending]] = slots[pending]
        for chunk, end in zip(chunks, (last + ~pending).tolist(), strict=True):
            count = chunk.count - chunk.from_device  # known to the host
            if count:
                field["tokens"][end - count : end] = chunk.sequence.tokens[chunk.start : chunk.start + count]


def decode_batch(field: dict[str, Array], tokens: Array, ahead: Array | int = 0) -> Batch:
    """The forward pass's view of a packed decode step.

    tokens: i32 [R], computed `ahead` positions behind the packed ones. A token that has no page, since it
    will not be wanted, is written to the dump page.
    """
    table, packed = field["page_table"], field["positions"]
    positions = jnp.maximum(packed + ahead, 0)
    lens = jnp.where(packed < 0, 0, positions + 1)
    index = positions // PAGE_SIZE
    pages = jnp.take_along_axis(table, index[:, None], axis=1, mode="fill", fill_value=DUMP_PAGE)[:, 0]
    slots = jnp.where(packed < 0, 0, pages * PAGE_SIZE + positions % PAGE_SIZE)
    attention = AttentionMetadata(slots, page_table=table, kv_lens=lens)
    return Batch(tokens, positions, rope_lens=positions + 1, attention=(attention,))


def ragged_batch(field: dict[str, Array], pending: Array) -> Batch:
    """The forward pass's view of a packed ragged step."""
    slots = field["token_slots"]
    attention = AttentionMetadata(
        slots=field["kv_slots"],
        page_table=field["page_table"],
        kv_lens=field["kv_lens"],
        tiles=field["tiles"],
    )
    return Batch(
        tokens=jnp.where(slots >= 0, pending[slots], field["tokens"]),
        positions=field["positions"],
        rope_lens=field["rope_lens"],
        attention=(attention,),
    )


def sampling_batch(field: dict[str, Array], ahead: Array | int = 0) -> SamplingBatch:
    """The sampler's view of a packed head call, `ahead` tokens later."""
    floats = {name: jax.lax.bitcast_convert_type(field[name], jnp.float32) for name in FLOATS}
    seed = jax.lax.bitcast_convert_type(field["seed"], jnp.uint32)
    return SamplingBatch(top_k=field["top_k"], seed=seed, step=field["step"] + ahead, **floats)
