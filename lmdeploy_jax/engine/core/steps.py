"""A step on a device: a forward pass, and the choice of the next tokens. What every kind of device shares.

A *backbone* runs the decoder and is compiled per number of tokens; a *head* turns hidden rows into tokens and
is compiled per number of rows. Cut there, the sizes add instead of multiplying. Between them stands `rows`
[max_batch_size, E], the hidden state of each of the step's sequences.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from lmdeploy_jax.cache.kv import KVCache
from lmdeploy_jax.converters.load import Skeleton
from lmdeploy_jax.engine.core.batch import (
    Fields,
    ImageLayout,
    Layout,
    RaggedLayout,
    Slots,
    ragged_batch,
    sampling_batch,
)
from lmdeploy_jax.engine.core.buckets import Buckets
from lmdeploy_jax.engine.core.history import Histories
from lmdeploy_jax.engine.core.masks import Masks
from lmdeploy_jax.engine.core.program import Ladder, Program, Programs
from lmdeploy_jax.engine.core.reports import Reports, pack_logprobs
from lmdeploy_jax.engine.core.state import History, Leaves, Update
from lmdeploy_jax.engine.core.step import Step
from lmdeploy_jax.engine.request import Draws, Head, Sequence
from lmdeploy_jax.sampling.logprobs import no_logprobs, top_logprobs
from lmdeploy_jax.sampling.mask import apply_mask, mask_words
from lmdeploy_jax.sampling.penalties import add_tokens, apply_penalties
from lmdeploy_jax.sampling.sampler import sample

if TYPE_CHECKING:
    from lmdeploy_jax.engine.core.encoder import Encoder

Errors = dict[Sequence, BaseException]


class Forward(NamedTuple):
    """A forward pass under way."""

    rows: Any = None  # hidden states [max_batch_size, E], one a chunk; None where nobody can want them
    tokens: Any = None  # i32 [R, k], the next tokens of each row, if the pass has drawn them
    most: int = 1  # how many of them there are
    hidden: Any = None  # hidden states [T, E] of all its tokens, if any of its prompts is reported on


@dataclass
class Drawn:
    """A step under way: `tokens` i32 [R, k], of whose row i the first `counts[i]` are what draw i has given.

    The scheduler counts on `most` tokens a draw. `packed`: each row's token is followed by log-probabilities,
    see `pack_logprobs`. Without draws (a prompt's earlier chunks) `tokens` is only something to wait for.
    """

    draws: Draws
    tokens: Any
    counts: Any = ()  # i32 [R], or the host's own
    most: int = 1
    packed: bool = False
    hidden: list[Any] = field(default_factory=list)  # per draw [E] or None
    logits: list[Any] = field(default_factory=list)  # per draw [V] or None
    routes: list[Any] = field(default_factory=list)  # per draw i32 [L, k] or None
    errors: Errors = field(default_factory=dict)  # draws whose user code failed


class Ragged(NamedTuple):
    """What a ragged step gives."""

    rows: Array  # [max_batch_size, E]
    hidden: Array  # [T, E]


class Steps(ABC):
    """Forward passes and draws on one kind of device, by the programs that suit it."""

    def __init__(self, programs: Programs, slots: Slots, buckets: Buckets, tile_rows: int) -> None:
        self.buckets = buckets
        self.histories = Histories(programs)
        self.reports = Reports(programs, (buckets.max_batch_size, *buckets.tokens))
        self._programs, self._state, self._slots = programs, programs.state, slots
        self._masks = Masks(self._state.vocab_size, programs.put)

        def ragged_program(tokens: int) -> Program:
            layout = RaggedLayout(slots, tokens, tile_rows)
            function = partial(ragged, skeleton=self._state.skeleton, layout=layout)
            return programs.add("ragged", function, size=tokens, writes=("caches",), layout=layout)

        self._ragged = Ladder(buckets.tokens, ragged_program)
        self._encoder = self._image_encoder(programs, buckets)
        sizes = () if self._encoder is None else buckets.images
        self._with_images = Ladder(sizes, partial(self._image_program, tile_rows))

    def _image_program(self, tile_rows: int, tokens: int) -> Program:
        vision = self._state.vision
        both = vision is not None and vision.family.bidirectional
        layout = ImageLayout(self._slots, tokens, tile_rows, bidirectional=both)
        function = partial(ragged_with_images, skeleton=self._state.skeleton, layout=layout)
        return self._programs.add("images", function, size=tokens, writes=("caches",), layout=layout)

    def _image_encoder(self, programs: Programs, buckets: Buckets) -> Encoder | None:
        """Text models do without what encodes images, and start without importing it."""
        if self._state.vision is None:
            return None
        from lmdeploy_jax.engine.core.encoder import Encoder

        return Encoder(programs, self._state.vision, buckets)

    def forward(self, step: Step) -> Forward:
        """Start a step's forward pass on the device."""
        if self._encoder is not None:
            self._encoder.prepare(step)
        return self._decode(step) if step.decode_only else self._mixed(step)

    def draw(self, draws: Draws, passed: Forward) -> Drawn:
        """Start the choice of the next tokens; the result is read later. Grammars go by the tokens read."""
        if not draws:
            return Drawn([], passed.rows)
        if passed.tokens is not None:
            return started(draws, passed.tokens, most=passed.most)
        return self._draw(draws, passed.rows)

    def begin_masks(self, draws: Draws) -> None:
        """Start what the next `draw`, which is of these, needs to know of their grammars, in a thread."""
        if draws:
            self._masks.begin(draws, self._head(draws).size)

    def warm_up(self) -> None:
        """Run the programs of plain steps once, on padding alone, where a first run takes longer."""
        return  # as on a CPU, where it does not

    @abstractmethod
    def _decode(self, step: Step) -> Forward:
        """The pass of a step in which every sequence decodes."""

    @abstractmethod
    def _draw(self, draws: Draws, rows: Array) -> Drawn:
        """Tokens from the rows of a pass that has drawn none itself."""

    @abstractmethod
    def _head(self, draws: Draws) -> Program:
        """The program that draws for them."""

    def _mixed(self, step: Step) -> Forward:
        out = self._ragged_pass(step)
        reported = any(chunk.sequence.report for chunk in step.chunks)
        return Forward(out.rows, hidden=out.hidden if reported else None)

    def _ragged_pass(self, step: Step) -> Ragged:
        if (index := step.embedding_index) is not None:
            program = self._with_images.fit(step.num_tokens)
            return program(packed=program.pack(step.chunks, index, step.lookahead))
        program = self._ragged.fit(step.num_tokens)
        return program(packed=program.pack(step.chunks))

    def forget_images(self) -> None:
        """What was held of images is gone from the device."""
        if self._encoder is not None:
            self._encoder.forget()

    def _mask(self, rows: int) -> Any:
        return self._state.ints(rows, mask_words(self._state.vocab_size))


def head_of(draws: Draws) -> Head:
    """The cheapest head that serves every sequence of the call."""
    return max((sequence.params.head for sequence, _ in draws), default=Head.GREEDY)


def started(
    draws: Draws, tokens: Any, errors: Errors | None = None, *, most: int = 1, packed: bool = False
) -> Drawn:
    """Draws that each give as many tokens as the scheduler counts on; their way to the host has begun."""
    tokens.copy_to_host_async()
    return Drawn(draws, tokens, [most] * len(draws), most, packed, errors=errors or {})


def ragged(
    leaves: Leaves,
    peers: Array | None,
    caches: KVCache,
    pending: Array,
    packed: Array,
    *,
    skeleton: Skeleton,
    layout: Layout,
) -> tuple[Ragged, Update]:
    """Prompt chunks and single tokens, packed."""
    field = layout.views(packed)
    hidden, caches = skeleton.merge(leaves, peers)(caches, ragged_batch(field, pending))
    return Ragged(hidden[field["last"]], hidden), Update(caches=caches)


def ragged_with_images(
    leaves: Leaves,
    peers: Array | None,
    caches: KVCache,
    pending: Array,
    image_rows: Array,
    packed: Array,
    *,
    skeleton: Skeleton,
    layout: Layout,
) -> tuple[Ragged, Update]:
    """The same, some tokens standing for rows of images."""
    field = layout.views(packed)
    hidden, caches = skeleton.merge(leaves, peers)(caches, ragged_batch(field, pending, image_rows))
    return Ragged(hidden[field["last"]], hidden), Update(caches=caches)


def reshaped(field: Fields, logits: Array, history: History) -> Array:
    """Logits f32 [R, V] after penalties and biases."""
    slots = field["slots"]
    return apply_penalties(logits, history.counts[slots], sampling_batch(field)) + history.bias[slots]


def draw_and_tell(
    field: Fields, raw: Array, logits: Array, pending: Array, history: History, mask: Array
) -> tuple[Array, Update]:
    """Draws from `logits` [R, V] what `mask` allows: -> packed i32 [R, 2 + 2k], with the log-probabilities
    of `raw` [R, V] where a row asks for them.
    """
    slots = field["slots"]
    tokens = sample(apply_mask(logits, mask), sampling_batch(field))
    found = jax.lax.cond(
        (field["logprobs"] != 0).any(), lambda: top_logprobs(raw, tokens), lambda: no_logprobs(raw)
    )
    history = History(add_tokens(history.counts, slots, tokens), history.bias)
    pending = pending.at[slots].set(next_input(tokens))
    return pack_logprobs(tokens, found), Update(pending=pending, history=history)


def next_input(tokens: Array) -> Array:
    """Drawn tokens i32 [R] as the next step reads them: a sequence that got none is in that step already."""
    return jnp.maximum(tokens, 0)
