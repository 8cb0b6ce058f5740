"""Packing a step into one int32 array on the host, and unpacking it inside the compiled step.

One array means one transfer. Floats travel as their bits. Every call makes a fresh array: a host buffer must
not be rewritten while its copy to the device may still be under way.
"""

from __future__ import annotations

from collections import abc
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lmdeploy_jax.engine.core.page_tables import Fields, PageTables, decode_metadata, ragged_metadata
from lmdeploy_jax.engine.core.step import Chunk
from lmdeploy_jax.engine.request import Draws, SamplingParams
from lmdeploy_jax.models.batch import Batch
from lmdeploy_jax.pallas_kernels.prefill_attention import build_tiles, max_tiles
from lmdeploy_jax.sampling.params import SamplingBatch

FLOATS = ("temperature", "top_p", "min_p", "repetition", "presence", "frequency")
PARAMS = (*FLOATS, "top_k", "seed")


class Slots:
    """The host's copy of what belongs to a slot: its sequence's pages and sampling parameters.

    `max_batch_size` slots; slot number `max_batch_size` is the dump slot of padding rows. mrope: whether
    steps are told of positions that are not the tokens' numbers.
    """

    def __init__(self, tables: PageTables, vocab_size: int, *, mrope: bool = False) -> None:
        self.max_batch_size = max_batch_size = tables.max_batch_size
        self.tables = tables
        self.params = np.zeros((len(PARAMS), max_batch_size + 1), np.int32)
        self.logprobs = np.zeros(max_batch_size + 1, np.int32)
        self._vocab_size, self.mrope = vocab_size, mrope
        self.set_params(max_batch_size, SamplingParams(max_new_tokens=1), seed=0)  # padding: plain greedy

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
        self.params[: len(FLOATS), slot] = np.array(floats, np.float32).view(np.int32)
        self.params[PARAMS.index("top_k"), slot] = min(params.top_k, self._vocab_size)
        self.params[PARAMS.index("seed"), slot] = np.uint32(seed & 0xFFFFFFFF).view(np.int32)
        self.logprobs[slot] = params.logprobs is not None

    def of(self, chunks: abc.Sequence[Chunk]) -> np.ndarray:
        """The slots of the chunks' sequences, whose page tables are up to date now."""
        self.tables.update(chunk.sequence for chunk in chunks)
        return np.fromiter((c.sequence.slot for c in chunks), np.int32, len(chunks))


class Layout:
    """Named int32 fields one after another in a flat array."""

    def __init__(self, **shapes: tuple[int, ...]) -> None:
        self._fields: dict[str, tuple[int, tuple[int, ...]]] = {}
        self.size = 0
        for name, shape in shapes.items():
            self._fields[name] = (self.size, shape)
            self.size += prod(shape)

    def views(self, flat: Any) -> Fields:
        """Each field as a view of a numpy array, or as a slice of a traced one."""
        return {
            n: flat[o : o + s[0]] if len(s) == 1 else flat[o : o + prod(s)].reshape(s)
            for n, (o, s) in self._fields.items()
        }

    def empty(self) -> tuple[np.ndarray, Fields]:
        """A new flat array of zeros, and its fields."""
        flat = np.zeros(self.size, np.int32)
        return flat, self.views(flat)


class DecodeLayout(Layout):
    """A step of one token for each of up to `rows` sequences."""

    def __init__(self, slots: Slots, rows: int, **more: tuple[int, ...]) -> None:
        self._slots = slots
        super().__init__(
            slots=(rows,),
            positions=(rows,),  # -1 in padding rows
            **({"rope_offsets": (rows,)} if slots.mrope else {}),
            **slots.tables.decode_fields(rows),
            **more,
        )

    def pack(self, chunks: abc.Sequence[Chunk]) -> np.ndarray:
        """A step over these chunks of one token each."""
        flat, field = self.empty()
        self._put(field, chunks)
        return flat

    def _put(self, field: Fields, chunks: abc.Sequence[Chunk]) -> None:
        n, slots = len(chunks), self._slots.of(chunks)
        field["slots"][:n], field["slots"][n:] = slots, self._slots.max_batch_size
        field["positions"][:n] = np.fromiter((c.start for c in chunks), np.int32, n)
        field["positions"][n:] = -1
        if "rope_offsets" in field:
            field["rope_offsets"][:n] = np.fromiter((c.sequence.rope_offset for c in chunks), np.int32, n)
        self._slots.tables.put(field, slots)


class SampledDecodeLayout(DecodeLayout):
    """A decode step that draws its own tokens, by each sequence's sampling parameters."""

    def __init__(self, slots: Slots, rows: int, **more: tuple[int, ...]) -> None:
        super().__init__(slots, rows, step=(rows,), params=(len(PARAMS), rows), **more)

    def pack(self, chunks: abc.Sequence[Chunk]) -> np.ndarray:
        flat, field = self.empty()
        self._put(field, chunks)
        self._put_params(field, chunks)
        return flat

    def _put_params(self, field: Fields, chunks: abc.Sequence[Chunk]) -> None:
        step = (c.start + 1 - c.sequence.num_prompt for c in chunks)  # of the first token that is drawn
        field["step"][: len(chunks)] = np.fromiter(step, np.int32, len(chunks))
        field["params"][:] = self._slots.params[:, field["slots"]]


class RaggedLayout(Layout):
    """A step of up to `tokens` tokens: prompt chunks, or chunks mixed with single decode tokens."""

    def __init__(self, slots: Slots, tokens: int, tile_rows: int, **more: tuple[int, ...]) -> None:
        self._slots, self._tile_rows = slots, tile_rows
        token, row = (tokens,), (slots.max_batch_size,)
        if slots.mrope:
            more = {"rope_positions": token} | more
        super().__init__(
            tokens=token,
            token_slots=token,  # slot whose pending token stands here, -1: `tokens` has it
            positions=token,
            rope_lens=token,
            slots=row,
            kv_lens=row,
            last=row,  # the token whose hidden state predicts the row's next token
            **slots.tables.ragged_fields(slots.max_batch_size, tokens),
            tiles=(max_tiles(tokens, slots.max_batch_size, tile_rows), 4),
            **more,
        )

    def pack(self, chunks: abc.Sequence[Chunk]) -> np.ndarray:
        """A step over these chunks, one after another."""
        flat, field = self.empty()
        n, slots = len(chunks), self._slots.of(chunks)
        counts = np.fromiter((c.count for c in chunks), np.int32, n)
        starts = np.fromiter((c.start for c in chunks), np.int32, n)
        offsets = np.cumsum(counts) - counts
        total = int(counts.sum())
        positions = np.arange(total, dtype=np.int32) + np.repeat(starts - offsets, counts)
        field["token_slots"][:] = -1
        self._put_tokens(field, chunks, slots, offsets + counts - 1)
        field["positions"][:total] = positions
        if "rope_positions" in field:
            turns = _rope_positions(chunks, positions)
            rope = field["rope_positions"]
            rope[..., :total] = turns if rope.ndim == 2 else turns[0]
        lens = np.fromiter((c.sequence.rope_len for c in chunks), np.int32, n)
        field["rope_lens"][:total] = np.maximum(positions + 1, np.repeat(lens, counts))
        tables = self._slots.tables
        tables.put_cache_slots(field, np.repeat(slots, counts), positions)
        field["slots"][:n], field["slots"][n:] = slots, self._slots.max_batch_size
        field["kv_lens"][:n] = starts + counts
        field["last"][:n] = offsets + counts - 1
        tables.put(field, slots)
        field["tiles"][:] = build_tiles(
            np.arange(n, dtype=np.int32), offsets, counts, starts, self._tile_rows, len(field["tiles"])
        )
        return flat

    @staticmethod
    def _put_tokens(field: Fields, chunks: abc.Sequence[Chunk], slots: np.ndarray, last: np.ndarray) -> None:
        pending = np.fromiter((c.from_device for c in chunks), np.bool_, len(chunks))
        field["token_slots"][last[pending]] = slots[pending]
        for chunk, end in zip(chunks, (last + ~pending).tolist(), strict=True):
            count = chunk.count - chunk.from_device  # known to the host
            if count:
                field["tokens"][end - count : end] = chunk.sequence.tokens[chunk.start : chunk.start + count]


def _rope_positions(chunks: abc.Sequence[Chunk], positions: np.ndarray) -> np.ndarray:
    """Positions int32 [3, T] of time, row and column, of a step's tokens at `positions`."""
    turns, first = np.tile(positions, (3, 1)), 0
    for chunk in chunks:
        rope, stop = chunk.sequence.request.prompt.rope, first + chunk.count
        if rope is not None:
            known = rope.positions[:, chunk.start : chunk.start + chunk.count]
            turns[:, first:stop] += rope.offset
            turns[:, first : first + known.shape[1]] = known
        first = stop
    return turns


class ImageLayout(RaggedLayout):
    """A ragged step among whose tokens are images': text turns by one position, images by three.

    bidirectional: an image's tokens see those of the same view that come after them.
    """

    def __init__(self, slots: Slots, tokens: int, tile_rows: int, *, bidirectional: bool = False) -> None:
        rope = {"rope_positions": (3, tokens)} if slots.mrope else {}
        ahead = {"lookahead": (tokens,)} if bidirectional else {}
        super().__init__(slots, tokens, tile_rows, embedding_index=(tokens,), **rope, **ahead)

    def pack(
        self,
        chunks: abc.Sequence[Chunk],
        index: abc.Sequence[int] | np.ndarray = (),
        lookahead: np.ndarray | None = None,
    ) -> np.ndarray:
        """`index`: of each token, which of the images' rows it has; -1: its own embedding. `lookahead`: how
        many tokens after it it sees.
        """
        flat = super().pack(chunks)
        field = self.views(flat)
        field["embedding_index"][: len(index)], field["embedding_index"][len(index) :] = index, -1
        if lookahead is not None:
            field["lookahead"][: len(lookahead)] = lookahead
        return flat


class HeadLayout(Layout):
    """The choice of the next tokens of up to `rows` sequences."""

    def __init__(self, slots: Slots, rows: int, **more: tuple[int, ...]) -> None:
        self._slots = slots
        super().__init__(rows=(rows,), slots=(rows,), **more)

    def pack(self, draws: Draws) -> np.ndarray:
        """`draws`: sequences with the row of hidden states that each draws from."""
        flat, field = self.empty()
        self._put(field, draws)
        return flat

    def _put(self, field: Fields, draws: Draws) -> None:
        n = len(draws)
        field["rows"][:n] = [row for _, row in draws]
        field["slots"][:n] = [s.slot for s, _ in draws]
        field["slots"][n:] = self._slots.max_batch_size


class SampledHeadLayout(HeadLayout):
    """A choice by each sequence's sampling parameters."""

    def __init__(self, slots: Slots, rows: int, **more: tuple[int, ...]) -> None:
        super().__init__(slots, rows, step=(rows,), params=(len(PARAMS), rows), **more)

    def _put(self, field: Fields, draws: Draws) -> None:
        super()._put(field, draws)
        field["step"][: len(draws)] = [s.num_generated - 1 for s, _ in draws]  # this draw is counted already
        field["params"][:] = self._slots.params[:, field["slots"]]


class FullHeadLayout(SampledHeadLayout):
    """A choice that may tell log-probabilities too."""

    def __init__(self, slots: Slots, rows: int, **more: tuple[int, ...]) -> None:
        super().__init__(slots, rows, logprobs=(rows,), **more)

    def _put(self, field: Fields, draws: Draws) -> None:
        super()._put(field, draws)
        field["logprobs"][:] = self._slots.logprobs[field["slots"]]


def decode_batch(field: Fields, tokens: Array, ahead: Array | int = 0) -> Batch:
    """The forward pass's view of a packed decode step.

    tokens: i32 [R], computed `ahead` positions behind the packed ones.
    """
    packed = field["positions"]
    positions = jnp.maximum(packed + ahead, 0)
    attention = decode_metadata(field, positions, packed >= 0)
    turns = positions + field["rope_offsets"] if "rope_offsets" in field else positions
    return Batch(tokens, turns, positions + 1, attention, sequence_slots=field["slots"])


def ragged_batch(field: Fields, pending: Array, image_rows: Array | None = None) -> Batch:
    """The forward pass's view of a packed ragged step, with what its `embedding_index` counts, if it has
    one.
    """
    slots = field["token_slots"]
    return Batch(
        tokens=jnp.where(slots >= 0, pending[slots], field["tokens"]),
        rope_positions=field["rope_positions" if "rope_positions" in field else "positions"],
        rope_lens=field["rope_lens"],
        attention=ragged_metadata(field),
        sequence_slots=field["slots"],
        embeddings=image_rows,
        embedding_index=field.get("embedding_index"),
    )


def sampling_batch(field: Fields, ahead: Array | int = 0) -> SamplingBatch:
    """The sampler's view of packed parameters, `ahead` tokens later."""
    params = {name: field["params"][i] for i, name in enumerate(PARAMS)}
    floats = {name: jax.lax.bitcast_convert_type(params[name], jnp.float32) for name in FLOATS}
    seed = jax.lax.bitcast_convert_type(params["seed"], jnp.uint32)
    return SamplingBatch(top_k=params["top_k"], seed=seed, step=field["step"] + ahead, **floats)
