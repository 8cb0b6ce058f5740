"""Dispatches steps to the device. Nothing here waits for a result, except where Python must change logits."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lmdeploy_jax.cache.kv import CacheSpec
from lmdeploy_jax.cache.pages import DUMP_PAGE
from lmdeploy_jax.converters.load import LoadedModel
from lmdeploy_jax.engine.core.batch import Draw, StepPacker
from lmdeploy_jax.engine.core.buckets import PAGE_COPIES, REPORT_ROWS, Buckets, fit
from lmdeploy_jax.engine.core.host_logits import change_logits
from lmdeploy_jax.engine.core.masks import Masks
from lmdeploy_jax.engine.core.program_cache import Key
from lmdeploy_jax.engine.core.scheduler import Chunk, Step
from lmdeploy_jax.engine.request import Draws, Head, Sequence
from lmdeploy_jax.sampling.penalties import bias_row, count_row


class Forward(NamedTuple):
    """A forward pass under way."""

    rows: Any  # hidden states [max_batch_size, E], one a chunk; None where nobody can want them
    tokens: Any = None  # i32 [R, steps or more], the next tokens of each row, if the pass has drawn them
    steps: int = 1


@dataclass
class Drawn:
    """A step under way: `tokens` i32 [R] or [R, steps or more], or packed with log-probabilities [R, 2 + 2k].

    Without draws (a prompt's earlier chunks) `tokens` is only something to wait for.
    """

    draws: Draws
    tokens: Any
    steps: int = 1
    packed: bool = False
    hidden: list[Any] = field(default_factory=list)  # per draw [E] or None
    logits: list[Any] = field(default_factory=list)  # per draw [V] or None
    errors: dict[Sequence, BaseException] = field(default_factory=dict)  # draws whose user code failed


class Runner:
    """Owns the device state: weights, KV cache, pending tokens, histories; and the compiled programs."""

    def __init__(
        self,
        model: LoadedModel,
        mesh: Mesh,
        buckets: Buckets,
        packer: StepPacker,
        cache: CacheSpec,
        programs: Mapping[Key, jax.stages.Compiled],
    ) -> None:
        self.model = model
        self.buckets = buckets
        self.packer = packer
        self._programs = programs
        self._replicated = NamedSharding(mesh, PartitionSpec())
        self.leaves = model.leaves
        self._cache_spec = cache
        self._caches: Any = cache.allocate()
        self._pending = self._put(np.zeros(buckets.max_batch_size + 1, np.int32))
        self._history: Any = None  # allocated with the first request that needs it
        self._biased: set[int] = set()  # slots whose bias row is not zero
        self._masks = Masks(self._vocab_size, self._put)
        self._no_logits: dict[int, Any] = {}  # by rows: logits on the device that nobody reads

    # -- device memory, given back and taken again ---------------------------------------------------------

    def release_caches(self) -> None:
        """Free the KV cache and the histories. Nothing may run before `allocate_caches`."""
        for array in jax.tree.leaves((self._caches, self._history)):
            array.delete()
        self._caches, self._history = None, None
        self._biased.clear()

    def allocate_caches(self) -> None:
        """A new, empty KV cache."""
        self._caches = self._cache_spec.allocate()

    def release_leaves(self) -> None:
        """Free the weights. Nothing may run before `leaves` is set again."""
        for leaf in self.leaves:
            leaf.delete()
        self.leaves = ()

    # -- before the first request --------------------------------------------------------------------------

    def warm_up(self) -> None:
        """Run the programs of plain steps once, on padding alone: on a GPU the first launch of each costs
        tens of milliseconds more, which somebody would wait for.
        """
        rows: Any = None
        for name, size in self._programs:
            if name == "ragged":
                args = (self.leaves, self._caches, self._pending, self.packer.pack_ragged([], size))
                rows, _, self._caches = self._run(name, size, *args)
            elif name == "decode":
                args = (self.leaves, self._caches, self._pending, self.packer.pack_decode([], size))
                rows, self._caches = self._run(name, size, *args)
            elif name in ("decode_greedy", "steps_greedy", "steps_sample"):
                args = (self.leaves, self._caches, self._pending, self.packer.pack_drawing([], size, 1))
                _, self._pending, self._caches = self._run(name, size, *args)
        for name, size in self._programs:
            if name in ("greedy", "sample"):
                drawn = (self._head_leaves, rows, self._pending, self.packer.pack_head([], size))
                _, self._pending = self._run(name, size, *drawn, self._masks.of([], size, {}))
        self._pending.block_until_ready()

    # -- a sequence gets its slot -------------------------------------------------------------------------

    def begin(self, sequence: Sequence) -> None:
        """Set up the slot of an admitted sequence: sampling parameters, and its history where one is
        needed.
        """
        params, slot = sequence.params, sequence.slot
        self.packer.set_params(slot, params, params.seed + sequence.index)
        if params.reshapes_logits:
            known = sequence.tokens
            counts = count_row(known[: sequence.num_prompt], known[sequence.num_prompt :], self._vocab_size)
            self._set_history(slot, counts, self._bias(sequence, sequence.num_generated))
        elif slot in self._biased:
            self._set_history(slot, np.zeros(self._vocab_size, np.int32), self._no_bias)
            self._biased.discard(slot)

    def _set_history(self, slot: int, counts: np.ndarray, bias: np.ndarray) -> None:
        self._need_history()
        self._history = self._run("set_history", 0, self._history, np.int32(slot), counts, bias)
        self._biased.add(slot)

    def _need_history(self) -> None:
        if self._history is None:
            self._history = self._run("new_history", 0)

    def _bias(self, sequence: Sequence, generated: int) -> np.ndarray:
        params = sequence.params
        early = params.stop_token_ids if generated < params.min_new_tokens else ()
        return bias_row(self._vocab_size, dict(params.logit_bias), [*params.banned_token_ids, *early])

    def _lift_early_ban(self, draws: Draws) -> None:
        """Allow the stop ids again for sequences that now draw the first token after `min_new_tokens`."""
        for sequence, _ in draws:
            params = sequence.params
            drawing = sequence.num_generated - 1  # index of the token that is being drawn
            if params.min_new_tokens and params.stop_token_ids and drawing == params.min_new_tokens:
                bias = self._bias(sequence, drawing)
                self._history = self._run("set_bias", 0, self._history, np.int32(sequence.slot), bias)

    # -- steps --------------------------------------------------------------------------------------------

    def forward(self, step: Step) -> Forward:
        """Start a step's forward pass on the device."""
        passed = self._decode(step) if step.decode_only else Forward(self._ragged(step))
        self._copy_pages(step.copies)
        return passed

    def draw(self, draws: Draws, passed: Forward) -> Drawn:
        """Start the choice of the next tokens; the result is read later. Grammars go by the tokens read."""
        if not draws:
            return Drawn([], passed.rows)
        if passed.tokens is None:
            drawn = self._draw(draws, passed.rows)
        else:
            drawn = _started(draws, passed.tokens, steps=passed.steps)
        self._attach_rows(drawn, passed.rows)
        return drawn

    def _decode(self, step: Step) -> Forward:
        size, head = fit(self.buckets.decode, len(step.chunks)), _head(step.sampled)
        if self.buckets.lean:
            return self._decode_any(size, step, head)
        if step.repeat > 1:
            return self._decode_drawing(f"steps_{head.name.lower()}", size, step)
        if head is Head.GREEDY and all(sequence.params.repeats for sequence, _ in step.sampled):
            return self._decode_drawing("decode_greedy", size, step)
        flat = self.packer.pack_decode(step.chunks, size)
        rows, self._caches = self._run("decode", size, self.leaves, self._caches, self._pending, flat)
        return Forward(rows)

    def _decode_any(self, size: int, step: Step, head: Head) -> Forward:
        draw = Draw.NOT
        if head < Head.FULL and all(sequence.params.grammar is None for sequence, _ in step.sampled):
            draw = Draw.GREEDY if head is Head.GREEDY else Draw.SAMPLE
        flat = self.packer.pack_drawing(step.chunks, size, step.repeat, draw)
        args = (self.leaves, self._caches, self._pending, flat)
        rows, tokens, self._pending, self._caches = self._run("decode", size, *args)
        return Forward(rows, tokens if draw else None, step.repeat)

    def _decode_drawing(self, name: str, size: int, step: Step) -> Forward:
        flat = self.packer.pack_drawing(step.chunks, size, step.repeat)
        args = (self.leaves, self._caches, self._pending, flat)
        tokens, self._pending, self._caches = self._run(name, size, *args)
        return Forward(None, tokens, step.repeat)

    def _ragged(self, step: Step) -> Any:
        size = fit(self.buckets.tokens, step.num_tokens)
        flat = self.packer.pack_ragged(step.chunks, size)
        rows, hidden, self._caches = self._run("ragged", size, self.leaves, self._caches, self._pending, flat)
        offset = 0
        for chunk in step.chunks:
            if chunk.sequence.report:
                self._report_prompt(chunk, hidden, size, offset)
            offset += chunk.count
        return rows

    def _copy_pages(self, copies: list[tuple[int, int]]) -> None:
        for i in range(0, len(copies), PAGE_COPIES):
            pages = np.zeros((2, PAGE_COPIES), np.int32)
            part = copies[i : i + PAGE_COPIES]
            pages[:, : len(part)] = np.array(part, np.int32).T
            self._caches = self._run("copy", 0, self._caches, pages[0].copy(), pages[1].copy())

    def clear_pages(self, pages: Seq[int]) -> None:
        """Overwrite pages that may hold NaN, and the dump page, to which padding writes: not every kernel
        keeps what stands behind a sequence's end out of its sums, and zero times NaN is NaN.
        """
        for i in range(0, len(pages), PAGE_COPIES):
            part = np.full(PAGE_COPIES, DUMP_PAGE, np.int32)
            part[: len(pages[i : i + PAGE_COPIES])] = pages[i : i + PAGE_COPIES]
            self._caches = self._run("clear", 0, self._caches, part)

    # -- sampling -----------------------------------------------------------------------------------------

    def _draw(self, draws: Draws, rows: Any) -> Drawn:
        head = _head(draws)
        if self.buckets.lean:
            return self._draw_any(draws, rows, head)
        if head is Head.FULL:
            return self._draw_full(draws, rows)
        size = self._head_rows(draws)
        errors: dict[Sequence, BaseException] = {}
        args = (self._head_leaves, rows, self._pending, self.packer.pack_head(draws, size))
        tokens, self._pending = self._run(head.name.lower(), size, *args, self._masks.of(draws, size, errors))
        return _started(draws, tokens, errors)

    def _draw_full(self, draws: Draws, rows: Any) -> Drawn:
        size = fit(self.buckets.sampling, len(draws))
        flat = self._put(self.packer.pack_head(draws, size))
        raw = self._run("logits", size, self._head_leaves, rows, flat)
        logits: Any = raw
        errors: dict[Sequence, BaseException] = {}
        if any(sequence.params.needs_host for sequence, _ in draws):
            logits, errors = change_logits(np.array(raw), [sequence for sequence, _ in draws])
        self._need_history()
        self._lift_early_ban(draws)
        tokens, self._pending, self._history = self._run(
            "full", size, raw, logits, self._pending, self._history, flat, self._masks.of(draws, size, errors)
        )
        return _started(draws, tokens, errors, packed=True)

    def _draw_any(self, draws: Draws, rows: Any, head: Head) -> Drawn:
        size, full = fit(self.buckets.sampling, len(draws)), head is Head.FULL
        host = any(sequence.params.needs_host for sequence, _ in draws)
        flat = self.packer.pack_head(draws, size, changed=host, reshapes=full)
        errors: dict[Sequence, BaseException] = {}
        changed = self._unchanged(size)
        if host:
            changed = np.zeros(changed.shape, np.float32)
            raw = self._logits_of(rows, [row for _, row in draws])
            changed[: len(draws)], errors = change_logits(raw, [sequence for sequence, _ in draws])
        self._need_history()
        if full:
            self._lift_early_ban(draws)
        state = (self._pending, self._history, flat, self._masks.of(draws, size, errors))
        tokens, self._pending, self._history = self._run(
            "head", size, self._head_leaves, rows, changed, *state
        )
        return _started(draws, tokens, errors, packed=True)

    def _unchanged(self, size: int) -> Any:
        if size not in self._no_logits:
            self._no_logits[size] = self._put(np.zeros((size, self._vocab_size), np.float32))
        return self._no_logits[size]

    def begin_masks(self, draws: Draws) -> None:
        """Start what the next `draw`, which is of these, needs to know of their grammars, in a thread."""
        if draws:
            self._masks.begin(draws, self._head_rows(draws))

    def _head_rows(self, draws: Draws) -> int:
        """The rows of the head that draws for them."""
        greedy = _head(draws) is Head.GREEDY and not self.buckets.lean
        return fit(self.buckets.decode if greedy else self.buckets.sampling, len(draws))

    # -- hidden states and logits that are reported -------------------------------------------------------

    def _attach_rows(self, call: Drawn, rows: Any) -> None:
        """Fetch hidden states and logits of generated tokens for the sequences that want them."""
        if not any(sequence.params.hidden or sequence.params.logits for sequence, _ in call.draws):
            return
        for i in range(0, len(call.draws), REPORT_ROWS):
            part = call.draws[i : i + REPORT_ROWS]
            taken = self._take(rows, [row for _, row in part])
            logits = np.asarray(self._logits(taken)) if any(s.params.logits for s, _ in part) else None
            hidden = np.asarray(taken, np.float32)
            for j, (sequence, _) in enumerate(part):
                call.hidden.append(hidden[j].copy() if sequence.params.hidden else None)
                call.logits.append(
                    logits[j].copy() if logits is not None and sequence.params.logits else None
                )

    def _report_prompt(self, chunk: Chunk, hidden: Any, size: int, offset: int) -> None:
        """Collect what a sequence wants to know of its prompt positions in this chunk."""
        sequence, params, report = chunk.sequence, chunk.sequence.params, chunk.sequence.report
        assert report is not None
        for start in range(0, chunk.count, REPORT_ROWS):
            count = min(REPORT_ROWS, chunk.count - start)
            first = chunk.start + start
            taken = self._take(hidden, range(offset + start, offset + start + count))
            if params.prompt_logprobs is not None:
                targets = np.zeros(REPORT_ROWS, np.int32)
                following = sequence.tokens[first + 1 : first + 1 + count]
                targets[: len(following)] = following
                packed = self._run("row_logprobs", REPORT_ROWS, self._head_leaves, taken, targets)
                report.logprobs.append(np.asarray(packed)[: len(following)])
            if params.logits == "all":
                report.logits.append(np.array(self._logits(taken))[:count])
            if params.hidden == "all":
                report.hidden.append(np.array(taken, np.float32)[:count])

    def _take(self, hidden: Any, index: Seq[int]) -> Any:
        padded = np.zeros(REPORT_ROWS, np.int32)
        padded[: len(index)] = index
        return self._run("take", hidden.shape[0], hidden, padded)

    def _logits_of(self, rows: Any, index: Seq[int]) -> np.ndarray:
        """f32 [N, V] of these rows."""
        parts = [index[i : i + REPORT_ROWS] for i in range(0, len(index), REPORT_ROWS)]
        return np.concatenate([np.asarray(self._logits(self._take(rows, p)))[: len(p)] for p in parts])

    def _logits(self, taken: Any) -> Any:
        return self._run("row_logits", REPORT_ROWS, self._head_leaves, taken)

    # -- device -------------------------------------------------------------------------------------------

    @property
    def _head_leaves(self) -> tuple[jax.Array, ...]:
        return tuple(self.leaves[i] for i in self.model.skeleton.head_places)

    @property
    def _vocab_size(self) -> int:
        return self.model.config.vocab_size

    @property
    def _no_bias(self) -> np.ndarray:
        return np.zeros(self._vocab_size, np.float32)

    def _put(self, array: Any) -> Any:
        return jax.device_put(array, self._replicated)

    def _run(self, name: str, size: int, *args: Any) -> Any:
        """Host arrays go as they are: the call hands them over at a fraction of what `device_put` takes."""
        key: Key = (name, size)
        return self._programs[key](*args)


def _started(
    draws: Draws,
    tokens: Any,
    errors: dict[Sequence, BaseException] | None = None,
    *,
    steps: int = 1,
    packed: bool = False,
) -> Drawn:
    tokens.copy_to_host_async()
    return Drawn(draws, tokens, steps, packed, errors=errors or {})


def _head(draws: Draws) -> Head:
    """The cheapest head that serves every sequence of the call."""
    return max((sequence.params.head for sequence, _ in draws), default=Head.GREEDY)
