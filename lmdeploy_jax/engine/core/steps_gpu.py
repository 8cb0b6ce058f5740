"""A GPU's steps. Each is as many programs as make it one CUDA graph and read nothing in vain."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lmdeploy_jax.cache.kv import KVCache
from lmdeploy_jax.converters.load import Skeleton
from lmdeploy_jax.engine.core.batch import (
    DecodeLayout,
    FullHeadLayout,
    HeadLayout,
    Layout,
    SampledDecodeLayout,
    SampledHeadLayout,
    Slots,
    decode_batch,
    sampling_batch,
)
from lmdeploy_jax.engine.core.buckets import Buckets
from lmdeploy_jax.engine.core.host_logits import change_logits
from lmdeploy_jax.engine.core.program import Ladder, Program, Programs
from lmdeploy_jax.engine.core.state import History, Leaves, Update
from lmdeploy_jax.engine.core.step import Step
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
from lmdeploy_jax.sampling.mask import apply_mask
from lmdeploy_jax.sampling.sampler import greedy, sample


class GpuSteps(Steps):
    """Greedy steps are one program; several of them, or of sampled ones, are a loop on the device. All others
    are a backbone and a head, or two where Python may change the logits in between.
    """

    def __init__(self, programs: Programs, slots: Slots, buckets: Buckets, tile_rows: int) -> None:
        super().__init__(programs, slots, buckets, tile_rows)
        decode, sampling = buckets.decode, buckets.sampling
        self._backbone = Ladder(decode, self._backbone_program)
        self._drawing = Ladder(decode, partial(self._drawing_program, "decode_greedy", 1, False))
        self._repeated: dict[Head, Ladder] = {}
        if (count := buckets.steps) > 1:
            for head, name in ((Head.GREEDY, "steps_greedy"), (Head.SAMPLE, "steps_sample")):
                sampled = head is Head.SAMPLE
                self._repeated[head] = Ladder(decode, partial(self._drawing_program, name, count, sampled))
        self._heads = {
            Head.GREEDY: Ladder(decode, partial(self._head_program, "greedy", False)),
            Head.SAMPLE: Ladder(sampling, partial(self._head_program, "sample", True)),
            Head.FULL: Ladder(sampling, self._full_program),
        }
        self._logits = Ladder(sampling, self._logits_program)

    def warm_up(self) -> None:
        """The first launch of each program costs tens of milliseconds more, which somebody would wait for."""
        ladders = (self._backbone, self._drawing, *self._repeated.values())
        for program in [program for ladder in ladders for program in ladder.values()]:
            program(packed=program.pack([]))
        if self._encoder is not None:
            self._encoder.warm_up()
        for program in [*self._with_images.values(), *self._ragged.values()]:
            rows = program(packed=program.pack([])).rows
        for head in (Head.GREEDY, Head.SAMPLE):
            for size, program in self._heads[head].items():
                program(rows=rows, packed=program.pack([]), mask=self._masks.of([], size, {}))
        self._state.pending.block_until_ready()

    # -- programs -----------------------------------------------------------------------------------------

    def _backbone_program(self, rows: int) -> Program:
        layout = DecodeLayout(self._slots, rows)
        most = self._state.max_batch_size
        function = partial(decode, skeleton=self._state.skeleton, layout=layout, max_rows=most)
        return self._programs.add("decode", function, size=rows, writes=("caches",), layout=layout)

    def _drawing_program(self, name: str, count: int, sampled: bool, rows: int) -> Program:
        layout = (SampledDecodeLayout if sampled else DecodeLayout)(self._slots, rows)
        function = partial(
            decode_drawing, skeleton=self._state.skeleton, layout=layout, count=count, sampled=sampled
        )
        writes = ("caches", "pending")
        return self._programs.add(name, function, size=rows, writes=writes, layout=layout)

    def _head_program(self, name: str, sampled: bool, rows: int) -> Program:
        layout, state = (SampledHeadLayout if sampled else HeadLayout)(self._slots, rows), self._state
        function = partial(head_drawing, skeleton=state.skeleton, layout=layout, sampled=sampled)
        inputs = {"rows": state.hidden(state.max_batch_size), "mask": self._mask(rows)}
        return self._programs.add(name, function, size=rows, writes=("pending",), layout=layout, **inputs)

    def _logits_program(self, rows: int) -> Program:
        layout, state = FullHeadLayout(self._slots, rows), self._state
        function = partial(head_logits, skeleton=state.skeleton, layout=layout)
        hidden = state.hidden(state.max_batch_size)
        return self._programs.add("logits", function, size=rows, layout=layout, rows=hidden)

    def _full_program(self, rows: int) -> Program:
        layout, logits = FullHeadLayout(self._slots, rows), self._state.floats(rows, self._state.vocab_size)
        inputs = {"raw": logits, "logits": logits, "mask": self._mask(rows)}
        function, writes = partial(head_full, layout=layout), ("pending", "history")
        return self._programs.add("full", function, size=rows, writes=writes, layout=layout, **inputs)

    # -- steps --------------------------------------------------------------------------------------------

    def _decode(self, step: Step) -> Forward:
        head, rows = head_of(step.sampled), len(step.chunks)
        if step.repeat > 1:
            return self._decode_drawing(self._repeated[head].fit(rows), step)
        if head is Head.GREEDY and all(sequence.params.repeats for sequence, _ in step.sampled):
            return self._decode_drawing(self._drawing.fit(rows), step)
        program = self._backbone.fit(rows)
        return Forward(program(packed=program.pack(step.chunks)))

    def _decode_drawing(self, program: Program, step: Step) -> Forward:
        return Forward(tokens=program(packed=program.pack(step.chunks)), most=step.repeat)

    def _head(self, draws: Draws) -> Program:
        return self._heads[head_of(draws)].fit(len(draws))

    def _draw(self, draws: Draws, rows: Array) -> Drawn:
        program, errors = self._head(draws), Errors()
        if head_of(draws) is Head.FULL:
            return self._draw_full(program, draws, rows)
        packed, mask = program.pack(draws), self._masks.of(draws, program.size, errors)
        return started(draws, program(rows=rows, packed=packed, mask=mask), errors)

    def _draw_full(self, program: Program, draws: Draws, rows: Array) -> Drawn:
        packed = self._programs.put(program.pack(draws))
        raw = self._logits[program.size](rows=rows, packed=packed)
        logits, errors = raw, Errors()
        if any(sequence.params.needs_host for sequence, _ in draws):
            logits, errors = change_logits(np.array(raw), [sequence for sequence, _ in draws])
        self.histories.allocate()
        self.histories.lift_early_ban(draws)
        mask = self._masks.of(draws, program.size, errors)
        tokens = program(raw=raw, logits=logits, packed=packed, mask=mask)
        return started(draws, tokens, errors, packed=True)


def decode(
    leaves: Leaves,
    peers: Array | None,
    caches: KVCache,
    pending: Array,
    packed: Array,
    *,
    skeleton: Skeleton,
    layout: Layout,
    max_rows: int,
) -> tuple[Array, Update]:
    """One token for each sequence: -> rows [max_rows, E]."""
    field = layout.views(packed)
    hidden, caches = skeleton.merge(leaves, peers)(caches, decode_batch(field, pending[field["slots"]]))
    return jnp.pad(hidden, ((0, max_rows - hidden.shape[0]), (0, 0))), Update(caches=caches)


def decode_drawing(
    leaves: Leaves,
    peers: Array | None,
    caches: KVCache,
    pending: Array,
    packed: Array,
    *,
    skeleton: Skeleton,
    layout: Layout,
    count: int,
    sampled: bool,
) -> tuple[Array, Update]:
    """`count` tokens for each sequence, one after another: -> tokens i32 [R, count]."""
    field = layout.views(packed)
    model, slots = skeleton.merge(leaves, peers), field["slots"]

    def step(i: Array | int, state: tuple[Array, Array, KVCache]) -> tuple[Array, Array, KVCache]:
        last, drawn, caches = state
        hidden, caches = model(caches, decode_batch(field, last, i))
        last = sample(model.logits(hidden), sampling_batch(field, i)) if sampled else model.greedy(hidden)
        return next_input(last), drawn.at[:, i].set(last), caches

    state = (pending[slots], jnp.zeros((len(slots), count), jnp.int32), caches)
    last, drawn, caches = jax.lax.fori_loop(0, count, step, state) if count > 1 else step(0, state)
    return drawn, Update(caches=caches, pending=pending.at[slots].set(last))


def head_drawing(
    head_leaves: Leaves,
    rows: Array,
    pending: Array,
    packed: Array,
    mask: Array,
    *,
    skeleton: Skeleton,
    layout: Layout,
    sampled: bool,
) -> tuple[Array, Update]:
    """-> tokens i32 [R, 1]."""
    field = layout.views(packed)
    logits = apply_mask(skeleton.merge_head(head_leaves).logits(rows[field["rows"]]), mask)
    tokens = sample(logits, sampling_batch(field)) if sampled else greedy(logits)
    return tokens[:, None], Update(pending=pending.at[field["slots"]].set(next_input(tokens)))


def head_logits(
    head_leaves: Leaves, rows: Array, packed: Array, *, skeleton: Skeleton, layout: Layout
) -> tuple[Array, Update]:
    """-> logits f32 [R, V], for `head_full`."""
    return skeleton.merge_head(head_leaves).logits(rows[layout.views(packed)["rows"]]), Update()


def head_full(
    raw: Array,
    logits: Array,
    pending: Array,
    history: History,
    packed: Array,
    mask: Array,
    *,
    layout: Layout,
) -> tuple[Array, Update]:
    """Penalties, biases, masks, sampling, log-probabilities: -> packed i32 [R, 2 + 2k].

    Draws from `logits` [R, V]; the log-probabilities are those of `raw` [R, V], which is the same array
    unless Python has changed the logits in between.
    """
    field = layout.views(packed)
    return draw_and_tell(field, raw, reshaped(field, logits, history), pending, history, mask)
