"""Dispatches steps to the device. Nothing here waits for a result, except where Python must change logits."""

from __future__ import annotations

from collections import abc

import numpy as np
from jax import Array

from lmdeploy_jax.cache.kv import KVCache
from lmdeploy_jax.cache.pages import DUMP_PAGE
from lmdeploy_jax.engine.core.batch import Slots
from lmdeploy_jax.engine.core.buckets import PAGE_COPIES, STATE_COPIES
from lmdeploy_jax.engine.core.program import Program, Programs
from lmdeploy_jax.engine.core.state import Update
from lmdeploy_jax.engine.core.step import Step
from lmdeploy_jax.engine.core.steps import Drawn, Forward, Steps
from lmdeploy_jax.engine.request import Draws, Sequence


class Runner:
    """Keeps the device's state: what slots hold, pages that are copied and cleared, steps as they come.

    Nothing can run before `allocate_caches`.
    """

    def __init__(self, programs: Programs, slots: Slots, steps: Steps) -> None:
        self.state = programs.state
        self._slots, self._steps = slots, steps
        pages, writes = self.state.ints(PAGE_COPIES), ("caches",)
        self._copy = programs.add("copy", copy_pages, writes=writes, source=pages, target=pages)
        self._copy_states: Program | None = None
        if self.state.cache.layout.states:
            rows = self.state.ints(STATE_COPIES)
            self._copy_states = programs.add(
                "copy_states", copy_states, writes=writes, source=rows, target=rows
            )
        self._clear = programs.add("clear", clear_pages, writes=writes, pages=pages)

    def allocate_caches(self) -> None:
        """A new, empty KV cache."""
        self.state.allocate_caches()

    def release_caches(self) -> None:
        """Free the KV cache, the histories and the rows of images."""
        self.state.release_caches()
        self._steps.histories.forget()
        self._steps.forget_images()

    def warm_up(self) -> None:
        """See `Steps.warm_up`."""
        self._steps.warm_up()

    def begin(self, sequence: Sequence) -> None:
        """Set up the slot of an admitted sequence: sampling parameters, and its history where one is
        needed.
        """
        self._slots.set_params(sequence.slot, sequence.params, sequence.params.seed + sequence.index)
        self._steps.histories.begin(sequence)

    # -- steps --------------------------------------------------------------------------------------------

    def forward(self, step: Step) -> Forward:
        """Start a step's forward pass on the device."""
        self.clear_pages(step.unclean)
        self._duplicate_states(step.restored)
        passed = self._steps.forward(step)
        if passed.hidden is not None:
            self._steps.reports.add_prompts(step.chunks, passed.hidden)
        self._duplicate(self._copy, step.copies, DUMP_PAGE, PAGE_COPIES)
        self._duplicate_states(step.kept)
        return passed

    def begin_masks(self, draws: Draws) -> None:
        """See `Steps.begin_masks`."""
        self._steps.begin_masks(draws)

    def draw(self, draws: Draws, passed: Forward) -> Drawn:
        """Start the choice of the next tokens; the result is read later. Grammars go by the tokens read."""
        drawn = self._steps.draw(draws, passed)
        drawn.hidden, drawn.logits, drawn.routes = self._steps.reports.of_draws(draws, passed.rows)
        return drawn

    # -- pages and states ----------------------------------------------------------------------------------

    def _duplicate_states(self, copies: list[tuple[int, int]]) -> None:
        if self._copy_states is not None:
            self._duplicate(self._copy_states, copies, self.state.cache.num_slots - 1, STATE_COPIES)

    def _duplicate(self, program: Program, copies: list[tuple[int, int]], nobodys: int, at_once: int) -> None:
        """Rows, (from, to); `nobodys` is copied onto itself where a call has no more of them."""
        for i in range(0, len(copies), at_once):
            rows = np.full((2, at_once), nobodys, np.int32)
            part = copies[i : i + at_once]
            rows[:, : len(part)] = np.array(part, np.int32).T
            program(source=rows[0].copy(), target=rows[1].copy())

    def clear_pages(self, pages: abc.Sequence[int]) -> None:
        """Overwrite pages that may hold NaN, and the dump page, to which padding writes: not every kernel
        keeps what stands behind a sequence's end out of its sums, and zero times NaN is NaN.
        """
        for i in range(0, len(pages), PAGE_COPIES):
            part = np.full(PAGE_COPIES, DUMP_PAGE, np.int32)
            part[: len(pages[i : i + PAGE_COPIES])] = pages[i : i + PAGE_COPIES]
            self._clear(pages=part)


def copy_pages(caches: KVCache, source: Array, target: Array) -> tuple[None, Update]:
    """Duplicate pages in every layer; unused entries copy the dump page onto itself."""
    return None, Update(caches=caches.map_pages(lambda array: array.at[target].set(array[source])))


def copy_states(caches: KVCache, source: Array, target: Array) -> tuple[None, Update]:
    """Duplicate slots in every recurrent layer; unused entries copy nobody's slot onto itself."""
    return None, Update(caches=caches.map_states(lambda array: array.at[target].set(array[source])))


def clear_pages(caches: KVCache, pages: Array) -> tuple[None, Update]:
    """Fill these pages of every layer with zeros."""
    return None, Update(caches=caches.map_pages(lambda array: array.at[pages].set(0)))
