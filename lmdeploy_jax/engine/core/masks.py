"""Which tokens the grammars of a draw allow, a bit a token: computed beside the device's forward pass."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from typing import Any

import numpy as np

from lmdeploy_jax.engine.request import Draws, Sequence
from lmdeploy_jax.sampling.mask import OPEN, mask_words

Failures = dict[Sequence, BaseException]


class Masks:
    """`put` places an array on the device, where masks that allow everything are kept."""

    def __init__(self, vocab_size: int, put: Callable[[np.ndarray], Any]) -> None:
        self._vocab_size = vocab_size
        self._put = put
        self._open: dict[int, Any] = {}  # by rows
        self._begun: Future[tuple[np.ndarray, Failures]] | None = None

    def begin(self, draws: Draws, size: int) -> None:
        """Start to compute in a thread what `of` is asked for next, of the same draws and size."""
        self._begun = self._thread.submit(self._fill, draws, size)

    def of(self, draws: Draws, size: int, errors: Failures) -> Any:
        """i32 [size, words]; adds to `errors` the sequences whose grammars have failed."""
        begun, self._begun = self._begun, None
        if begun is None and all(sequence.matcher is None for sequence, _ in draws):
            if size not in self._open:
                self._open[size] = self._put(self._allowing_all(size))
            return self._open[size]
        mask, failed = begun.result() if begun is not None else self._fill(draws, size)
        errors |= failed
        return mask

    def _fill(self, draws: Draws, size: int) -> tuple[np.ndarray, Failures]:
        from lmdeploy_jax.guided.matcher import fill_masks  # llguidance is loaded with the first grammar

        guided = {s: (i, s.matcher) for i, (s, _) in enumerate(draws) if s.matcher is not None}
        mask = self._allowing_all(size)
        fill_masks(mask, list(guided.values()))
        return mask, {s: matcher.failure for s, (_, matcher) in guided.items() if matcher.failure}

    def _allowing_all(self, size: int) -> np.ndarray:
        return np.full((size, mask_words(self._vocab_size)), OPEN, np.int32)

    @cached_property
    def _thread(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(1, thread_name_prefix="lmdeploy_jax masks")
