"""Hidden states, logits and log-probabilities that sequences want to know, fetched from the device."""

from __future__ import annotations

from collections import abc
from collections.abc import Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lmdeploy_jax.converters.load import Skeleton
from lmdeploy_jax.engine.core.buckets import REPORT_ROWS
from lmdeploy_jax.engine.core.program import Programs
from lmdeploy_jax.engine.core.state import Leaves, Update
from lmdeploy_jax.engine.core.step import Chunk
from lmdeploy_jax.engine.request import Draws
from lmdeploy_jax.sampling.logprobs import TopLogprobs, top_logprobs

Rows = list[np.ndarray | None]


class Reports:
    """Looks at hidden states that a forward pass has left; `sizes` are the row counts of those."""

    def __init__(self, programs: Programs, sizes: Iterable[int]) -> None:
        state, ints = programs.state, programs.state.ints(REPORT_ROWS)
        self._config = state.skeleton.config
        self._take_rows = {
            size: programs.add("take", take_rows, size=size, hidden=state.hidden(size), index=ints)
            for size in set(sizes)
        }
        taken = state.hidden(REPORT_ROWS)
        of_rows = row_scores if state.skeleton.config.judges_only else row_logits
        logits, logprobs = (partial(f, skeleton=state.skeleton) for f in (of_rows, row_logprobs))
        self._row_logits = programs.add("row_logits", logits, size=REPORT_ROWS, rows=taken)
        self._row_logprobs = programs.add(
            "row_logprobs", logprobs, size=REPORT_ROWS, rows=taken, targets=ints
        )

    def of_draws(self, draws: Draws, rows: Any) -> tuple[Rows, Rows, Rows]:
        """The hidden states [E], the logits [V] and the experts i32 [L, k] of the row that each draw was made
        from, where its sequence wants them; empty where none does.
        """
        hidden: Rows = []
        logits: Rows = []
        routes: Rows = []
        if not any(sequence.params.wants_rows for sequence, _ in draws):
            return hidden, logits, routes
        for i in range(0, len(draws), REPORT_ROWS):
            part = draws[i : i + REPORT_ROWS]
            taken = self._take(rows, [row for _, row in part])
            scores = self._logits(taken) if any(s.params.logits for s, _ in part) else None
            states, experts = self._parts(taken)
            for j, (sequence, _) in enumerate(part):
                hidden.append(states[j].copy() if sequence.params.hidden else None)
                logits.append(scores[j].copy() if scores is not None and sequence.params.logits else None)
                routes.append(experts[j] if sequence.params.routes else None)
        return hidden, logits, routes

    def _parts(self, taken: Any) -> tuple[np.ndarray, np.ndarray]:
        """Rows of a forward pass as hidden states f32 [N, E] and experts i32 [N, L, k]."""
        config, rows = self._config, np.asarray(taken, np.float32)
        told = rows[:, config.hidden_size :].astype(np.int32)
        shape = (len(config.layers), config.choices if config.reports_routes else 0)
        return rows[:, : config.hidden_size], told.reshape(len(rows), *shape)

    def add_prompts(self, chunks: abc.Sequence[Chunk], hidden: Any) -> None:
        """Add to the sequences' reports what they want to know of their prompt positions in these chunks;
        `hidden` [T, E] holds the chunks' tokens one after another.
        """
        offset = 0
        for chunk in chunks:
            # The step behind the prompt's last may be dispatched before that one's token is read.
            if chunk.sequence.report and chunk.start < chunk.sequence.num_prompt:
                self._add_prompt(chunk, hidden, offset)
            offset += chunk.count

    def _add_prompt(self, chunk: Chunk, hidden: Any, offset: int) -> None:
        sequence, params, report = chunk.sequence, chunk.sequence.params, chunk.sequence.report
        assert report is not None
        for start in range(0, chunk.count, REPORT_ROWS):
            count = min(REPORT_ROWS, chunk.count - start)
            first = chunk.start + start
            taken = self._take(hidden, range(offset + start, offset + start + count))
            if params.prompt_logprobs is not None:
                report.logprobs.append(self._logprobs(taken, sequence.tokens[first + 1 : first + 1 + count]))
            if params.logits == "all":
                report.logits.append(self._logits(taken)[:count].copy())
            if params.hidden == "all":
                report.hidden.append(self._parts(taken)[0][:count].copy())
            if params.routes:
                report.routes.append(self._parts(taken)[1][:count])

    def logits_of(self, rows: Any, index: abc.Sequence[int]) -> np.ndarray:
        """f32 [N, V] of these rows, to be written to."""
        parts = [index[i : i + REPORT_ROWS] for i in range(0, len(index), REPORT_ROWS)]
        return np.concatenate([self._logits(self._take(rows, part))[: len(part)] for part in parts])

    def _take(self, hidden: Any, index: abc.Sequence[int]) -> Any:
        padded = np.zeros(REPORT_ROWS, np.int32)
        padded[: len(index)] = index
        return self._take_rows[hidden.shape[0]](hidden=hidden, index=padded)

    def _logits(self, taken: Any) -> np.ndarray:
        return np.asarray(self._row_logits(rows=taken))

    def _logprobs(self, taken: Any, following: abc.Sequence[int]) -> np.ndarray:
        targets = np.zeros(REPORT_ROWS, np.int32)
        targets[: len(following)] = following
        return np.asarray(self._row_logprobs(rows=taken, targets=targets))[: len(following)]


def take_rows(hidden: Array, index: Array) -> tuple[Array, Update]:
    """hidden [T, E], index i32 [N] -> [N, E]."""
    return hidden[index], Update()


def row_logits(head_leaves: Leaves, rows: Array, *, skeleton: Skeleton) -> tuple[Array, Update]:
    """rows [N, E] -> f32 [N, V]."""
    return skeleton.merge_head(head_leaves).logits(rows), Update()


def row_scores(head_leaves: Leaves, rows: Array, *, skeleton: Skeleton) -> tuple[Array, Update]:
    """rows [N, E] -> f32 [N, labels]: a score head's logits."""
    return skeleton.merge_head(head_leaves).scores(rows), Update()


def row_logprobs(
    head_leaves: Leaves, rows: Array, targets: Array, *, skeleton: Skeleton
) -> tuple[Array, Update]:
    """rows [N, E] and the tokens that follow them, i32 [N] -> packed i32 [N, 2 + 2k]."""
    logits = skeleton.merge_head(head_leaves).logits(rows)
    return pack_logprobs(targets, top_logprobs(logits, targets)), Update()


def pack_logprobs(tokens: Array, found: TopLogprobs) -> Array:
    """-> i32 [N, 2 + 2k]: token, its log-probability's bits, k ids, k log-probabilities' bits."""
    bits = [jax.lax.bitcast_convert_type(x, jnp.int32) for x in (found.token_logprob, found.logprobs)]
    return jnp.concatenate([tokens[:, None], bits[0][:, None], found.ids, bits[1]], axis=1)
