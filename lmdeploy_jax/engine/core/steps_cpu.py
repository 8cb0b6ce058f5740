"""A CPU's steps. Programs are slow to compile there, while padding and branches cost next to nothing: so
there are few, and each does whatever a step may ask for.
"""

from __future__ import annotations

import enum
from collections import abc
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lmdeploy_jax.cache.kv import KVCache
from lmdeploy_jax.converters.load import Skeleton
from lmdeploy_jax.engine.core.batch import (
    FullHeadLayout,
    Layout,
    SampledDecodeLayout,
    Slots,
    decode_batch,
    sampling_batch,
)
from lmdeploy_jax.engine.core.buckets import Buckets
from lmdeploy_jax.engine.core.host_logits import change_logits
from lmdeploy_jax.engine.core.program import Ladder, Program, Programs
from lmdeploy_jax.engine.core.state import History, Leaves, Update
from lmdeploy_jax.engine.core.step import Chunk, Step
from lmdeploy_jax.engine.core.steps import (
    Drawn,
    Errors,
    Forward,
    Steps,
    draw_and_tell,
    head_of,
    next_input,
    reshaped,
    started,
)
from lmdeploy_jax.engine.request import Draws, Head
from lmdeploy_jax.sampling.sampler import greedy, sample


class Draw(enum.IntEnum):
    """How a decode step draws the next tokens."""

    NOT = 0
    GREEDY = 1
    SAMPLE = 2


class CpuDecodeLayout(SampledDecodeLayout):
    """A decode step that is told how to draw, and how often."""

    def __init__(self, slots: Slots, rows: int) -> None:
        super().__init__(slots, rows, draw=(1,), count=(1,))

    def pack(self, chunks: abc.Sequence[Chunk], count: int = 1, draw: Draw = Draw.SAMPLE) -> np.ndarray:
        """`count` steps over these chunks of one token each."""
        flat, field = self.empty()
        self._put(field, chunks)
        if draw is Draw.SAMPLE:  # nothing else reads them
            self._put_params(field, chunks)
        field["draw"][:], field["count"][:] = draw, count
        return flat


class CpuHeadLayout(FullHeadLayout):
    """A choice of tokens that is told what is to be done to the logits before."""

    def __init__(self, slots: Slots, rows: int) -> None:
        super().__init__(slots, rows, changed=(1,), reshapes=(1,))

    def pack(self, draws: Draws, *, changed: bool = False, reshapes: bool = False) -> np.ndarray:
        """changed: by Python; reshapes: by penalties and biases."""
        flat, field = self.empty()
        self._put(field, draws)
        field["changed"][:], field["reshapes"][:] = changed, reshapes
        return flat


class CpuSteps(Steps):
    """One program does every decode step, once or several times, and one is every head."""

    def __init__(self, programs: Programs, slots: Slots, buckets: Buckets, tile_rows: int) -> None:
        super().__init__(programs, slots, buckets, tile_rows)
        self._decodes = Ladder(buckets.decode, self._decode_program)
        self._heads = Ladder(buckets.sampling, self._head_program)
        self._no_logits: dict[int, Any] = {}  # by rows: logits on the device that nobody reads

    def _decode_program(self, rows: int) -> Program:
        layout, state = CpuDecodeLayout(self._slots, rows), self._state
        most, max_rows = self.buckets.steps, state.max_batch_size
        function = partial(decode, skeleton=state.skeleton, layout=layout, max_rows=max_rows, most=most)
        writes = ("caches", "pending")
        return self._programs.add("decode", function, size=rows, writes=writes, layout=layout)

    def _head_program(self, rows: int) -> Program:
        layout, state = CpuHeadLayout(self._slots, rows), self._state
        changed, hidden = state.floats(rows, state.vocab_size), state.hidden(state.max_batch_size)
        inputs = {"rows": hidden, "changed": changed, "mask": self._mask(rows)}
        function, writes = partial(head, skeleton=state.skeleton, layout=layout), ("pending", "history")
        return self._programs.add("head", function, size=rows, writes=writes, layout=layout, **inputs)

    def _decode(self, step: Step) -> Forward:
        program, head, draw = self._decodes.fit(len(step.chunks)), head_of(step.sampled), Draw.NOT
        if head < Head.FULL and all(sequence.params.grammar is None for sequence, _ in step.sampled):
            draw = Draw.GREEDY if head is Head.GREEDY else Draw.SAMPLE
        out = program(packed=program.pack(step.chunks, step.repeat, draw))
        return Forward(out.rows, out.tokens if draw else None, step.repeat)

    def _head(self, draws: Draws) -> Program:
        return self._heads.fit(len(draws))

    def _draw(self, draws: Draws, rows: Array) -> Drawn:
        program, full = self._head(draws), head_of(draws) is Head.FULL
        host = any(sequence.params.needs_host for sequence, _ in draws)
        packed = program.pack(draws, changed=host, reshapes=full)
        changed, errors = self._unchanged(program.size), Errors()
        if host:
            changed = np.zeros(changed.shape, np.float32)
            raw = self.reports.logits_of(rows, [row for _, row in draws])
            changed[: len(draws)], errors = change_logits(raw, [sequence for sequence, _ in draws])
        self.histories.allocate()
        if full:
            self.histories.lift_early_ban(draws)
        mask = self._masks.of(draws, program.size, errors)
        return started(
            draws, program(rows=rows, changed=changed, packed=packed, mask=mask), errors, packed=True
        )

    def _unchanged(self, rows: int) -> Any:
        if rows not in self._no_logits:
            self._no_logits[rows] = self._programs.put(np.zeros((rows, self._state.vocab_size), np.float32))
        return self._no_logits[rows]


class Decoded(NamedTuple):
    """What a decode step gives."""

    rows: Array  # [max_batch_size, E], of its last token
    tokens: Array  # i32 [R, most]; past the step's count 0


def decode(
    leaves: Leaves,
    caches: KVCache,
    pending: Array,
    packed: Array,
    *,
    skeleton: Skeleton,
    layout: Layout,
    max_rows: int,
    most: int,
) -> tuple[Decoded, Update]:
    """One program for every decode step.

    `packed` says how many steps there are, at most `most`, and how they draw: greedily, by sampling, or not
    at all (and then there is one). Both are read on the device, which would take a GPU out of its CUDA graph.
    """
    field = layout.views(packed)
    model, slots = skeleton.merge(leaves), field["slots"]

    def step(
        i: Array | int, state: tuple[Array, Array, Array, KVCache]
    ) -> tuple[Array, Array, Array, KVCache]:
        _, last, drawn, caches = state
        hidden, caches = model(caches, decode_batch(field, last, i))
        last = jax.lax.switch(
            field["draw"][0],
            (
                lambda: last,
                lambda: greedy(model.logits(hidden)),
                lambda: sample(model.logits(hidden), sampling_batch(field, i)),
            ),
        )
        return hidden, next_input(last), drawn.at[:, i].set(last), caches

    hidden = jnp.zeros((len(slots), model.config.row_width), model.dtype)
    state = (hidden, pending[slots], jnp.zeros((len(slots), most), jnp.int32), caches)
    looped = partial(jax.lax.fori_loop, 0, field["count"][0], step) if most > 1 else partial(step, 0)
    hidden, last, drawn, caches = looped(state)
    rows = jnp.pad(hidden, ((0, max_rows - hidden.shape[0]), (0, 0)))
    return Decoded(rows, drawn), Update(caches=caches, pending=pending.at[slots].set(last))


def head(
    head_leaves: Leaves,
    rows: Array,
    changed: Array,
    pending: Array,
    history: History,
    packed: Array,
    mask: Array,
    *,
    skeleton: Skeleton,
    layout: Layout,
) -> tuple[Array, Update]:
    """One program for every way of drawing, which does only what `packed` asks for.

    -> packed i32 [R, 2 + 2k]. `changed` f32 [R, V]: the logits where Python has changed them.
    """
    field = layout.views(packed)
    raw = skeleton.merge_head(head_leaves).logits(rows[field["rows"]])
    logits = jax.lax.cond(field["changed"][0] != 0, lambda: changed, lambda: raw)
    logits = jax.lax.cond(field["reshapes"][0] != 0, lambda: reshaped(field, logits, history), lambda: logits)
    return draw_and_tell(field, raw, logits, pending, history, mask)
