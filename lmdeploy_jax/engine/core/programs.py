"""The list of programs an engine compiles: which step, which sizes, which arrays are donated."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lmdeploy_jax.cache.kv import CacheSpec
from lmdeploy_jax.converters.load import LoadedModel
from lmdeploy_jax.engine.core import steps
from lmdeploy_jax.engine.core.batch import StepPacker
from lmdeploy_jax.engine.core.buckets import PAGE_COPIES, REPORT_ROWS, Buckets
from lmdeploy_jax.engine.core.compile import Program
from lmdeploy_jax.engine.core.program_cache import Key
from lmdeploy_jax.sampling.mask import mask_words


@dataclass(frozen=True)
class ProgramBuilder:
    """Builds the programs for one model on one mesh; `all()` is what gets compiled."""

    model: LoadedModel
    packer: StepPacker
    buckets: Buckets
    cache: CacheSpec
    mesh: Mesh

    def all(self) -> dict[Key, Program]:
        """Lean buckets do without programs that another one can stand in for at a small price: one draws in
        every way of a decode step, once or several times, and one is every head.
        """
        made: dict[Key, Program] = {}
        lean = self.buckets.lean
        for rows in self.buckets.decode:
            if lean:
                made["decode", rows] = self._decode_any(rows)
                continue
            made["decode", rows] = self._decode(rows)
            made["decode_greedy", rows] = self._decode_drawing(rows, 1, sampled=False)
            if self.buckets.steps > 1:
                made["steps_greedy", rows] = self._decode_drawing(rows, self.buckets.steps, sampled=False)
                made["steps_sample", rows] = self._decode_drawing(rows, self.buckets.steps, sampled=True)
            made["greedy", rows] = self._head(steps.head_greedy, rows)
        for rows in self.buckets.sampling:
            if lean:
                made["head", rows] = self._head_any(rows)
                continue
            made["sample", rows] = self._head(steps.head_sample, rows)
            made["logits", rows] = self._head_logits(rows)
            made["full", rows] = self._head_full(rows)
        for tokens in self.buckets.tokens:
            made["ragged", tokens] = self._ragged(tokens)
        return made | self._row_programs() | self._state_programs()

    @property
    def made_from(self) -> tuple[object, ...]:
        """All that the programs depend on besides their code, told by `repr`."""
        leaves = [(x.shape, x.dtype, x.sharding) for x in self._leaves]
        shapes = (self.packer.table_width, self.packer.tile_rows, self.packer.max_batch_size)
        return (self.model.skeleton.kernels, self.model.config, leaves, shapes, self.buckets, self.cache)

    # -- backbones ----------------------------------------------------------------------------------------

    def _decode(self, rows: int) -> Program:
        layout = self.packer.decode_layout(rows)
        function = partial(steps.decode, self.model.merge, layout, self.buckets.max_batch_size)
        args = (self._leaves, self.cache.specs, self._pending, self._ints(layout.size))
        return Program(function, args, (self._replicated, self.cache.shardings), donate=(1,))

    def _decode_any(self, rows: int) -> Program:
        layout, most = self.packer.drawing_layout(rows), self.buckets.max_batch_size
        function = partial(steps.decode_any, self.model.merge, layout, most, self.buckets.steps)
        args = (self._leaves, self.cache.specs, self._pending, self._ints(layout.size))
        out = (self._replicated, self._replicated, self._replicated, self.cache.shardings)
        return Program(function, args, out, donate=(1, 2))

    def _decode_drawing(self, rows: int, count: int, *, sampled: bool) -> Program:
        layout = self.packer.drawing_layout(rows)
        function = partial(steps.decode_drawing, self.model.merge, layout, count, sampled)
        args = (self._leaves, self.cache.specs, self._pending, self._ints(layout.size))
        return Program(
            function, args, (self._replicated, self._replicated, self.cache.shardings), donate=(1, 2)
        )

    def _ragged(self, tokens: int) -> Program:
        layout = self.packer.ragged_layout(tokens)
        function = partial(steps.ragged, self.model.merge, layout)
        args = (self._leaves, self.cache.specs, self._pending, self._ints(layout.size))
        out = (self._replicated, self._replicated, self.cache.shardings)
        return Program(function, args, out, donate=(1,))

    # -- heads --------------------------------------------------------------------------------------------

    def _head(self, step: Any, rows: int) -> Program:
        layout = self.packer.head_layout(rows)
        args = (self._head_leaves, self._rows, self._pending, self._ints(layout.size), self._mask(rows))
        return Program(partial(step, self.model.merge_head, layout), args, self._replicated, donate=(2,))

    def _head_logits(self, rows: int) -> Program:
        layout = self.packer.head_layout(rows)
        args = (self._head_leaves, self._rows, self._ints(layout.size))
        return Program(partial(steps.head_logits, self.model.merge_head, layout), args, self._replicated)

    def _head_full(self, rows: int) -> Program:
        layout = self.packer.head_layout(rows)
        logits = self._spec((rows, self.model.config.vocab_size), jnp.float32)
        flat, mask = self._ints(layout.size), self._mask(rows)
        args = (logits, logits, self._pending, self._history, flat, mask)
        return Program(partial(steps.head_full, layout), args, self._replicated, donate=(2, 3))

    def _head_any(self, rows: int) -> Program:
        layout = self.packer.head_layout(rows)
        changed = self._spec((rows, self.model.config.vocab_size), jnp.float32)
        state = (self._pending, self._history, self._ints(layout.size), self._mask(rows))
        function = partial(steps.head_any, self.model.merge_head, layout)
        return Program(
            function, (self._head_leaves, self._rows, changed, *state), self._replicated, donate=(3, 4)
        )

    # -- rows that are reported on, and state -------------------------------------------------------------

    def _row_programs(self) -> dict[Key, Program]:
        made: dict[Key, Program] = {}
        for source in {self.buckets.max_batch_size, *self.buckets.tokens}:
            args = (self._hidden(source), self._ints(REPORT_ROWS))
            made["take", source] = Program(steps.take_rows, args, self._replicated)
        taken = self._hidden(REPORT_ROWS)
        logits = partial(steps.row_logits, self.model.merge_head)
        logprobs = partial(steps.row_logprobs, self.model.merge_head)
        made["row_logits", REPORT_ROWS] = Program(logits, (self._head_leaves, taken), self._replicated)
        scored = (self._head_leaves, taken, self._ints(REPORT_ROWS))
        made["row_logprobs", REPORT_ROWS] = Program(logprobs, scored, self._replicated)
        return made

    def _state_programs(self) -> dict[Key, Program]:
        vocab, scalar = self.model.config.vocab_size, self._spec((), jnp.int32)
        bias = self._spec((vocab,), jnp.float32)
        pages = self._ints(PAGE_COPIES)
        copied = (self.cache.specs, pages, pages)
        started = (self._history, scalar, self._ints(vocab), bias)
        zeros = partial(jax.tree.map, lambda spec: jnp.zeros(spec.shape, spec.dtype), self._history)
        return {
            ("copy", 0): Program(steps.copy_pages, copied, self.cache.shardings, donate=(0,)),
            ("clear", 0): Program(
                steps.clear_pages, (self.cache.specs, pages), self.cache.shardings, donate=(0,)
            ),
            ("new_history", 0): Program(zeros, (), self._replicated),
            ("set_history", 0): Program(steps.set_history, started, self._replicated, donate=(0,)),
            ("set_bias", 0): Program(
                steps.set_bias, (self._history, scalar, bias), self._replicated, donate=(0,)
            ),
        }

    # -- shapes -------------------------------------------------------------------------------------------

    @property
    def _replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

    def _spec(self, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self._replicated)

    def _ints(self, size: int) -> jax.ShapeDtypeStruct:
        return self._spec((size,), jnp.int32)

    def _mask(self, rows: int) -> jax.ShapeDtypeStruct:
        return self._spec((rows, mask_words(self.model.config.vocab_size)), jnp.int32)

    def _hidden(self, rows: int) -> jax.ShapeDtypeStruct:
        return self._spec((rows, self.model.config.hidden_size), self.model.dtype)

    @property
    def _rows(self) -> jax.ShapeDtypeStruct:
        return self._hidden(self.buckets.max_batch_size)

    @property
    def _pending(self) -> jax.ShapeDtypeStruct:
        return self._ints(self.buckets.max_batch_size + 1)

    @property
    def _history(self) -> steps.History:
        shape = (self.buckets.max_batch_size + 1, self.model.config.vocab_size)
        specs: tuple[Any, Any] = (self._spec(shape, jnp.int32), self._spec(shape, jnp.float32))
        return steps.History(*specs)

    @property
    def _leaves(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        return tuple(jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for x in self.model.leaves)

    @property
    def _head_leaves(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        return tuple(self._leaves[i] for i in self.model.skeleton.head_places)
