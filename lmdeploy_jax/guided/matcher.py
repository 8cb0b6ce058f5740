"""Where a sequence stands in its grammar, and which tokens may come next."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from functools import cache

import numpy as np
from llguidance import LLExecutor, LLMatcher
from llguidance.numpy import fill_next_token_bitmask, fill_next_token_bitmask_par

from lmdeploy_jax.errors import RequestError
from lmdeploy_jax.guided.panics import as_request_error, panics_are_errors

# Few threads: masks that are quick to compute take longer in many threads than in one; only slow ones gain.
THREADS = min(4, max(1, (os.cpu_count() or 1) // 4))
_FEW = 4  # masks that one thread computes sooner than several can be woken


class Matcher:
    """One sequence's way through a grammar. `stop_ids` may come wherever the grammar may end."""

    def __init__(
        self,
        matcher: LLMatcher,
        vocab_size: int,
        stop_ids: Iterable[int],
        on_advance: Callable[[], None] = lambda: None,
    ) -> None:
        self._matcher = matcher
        self._on_advance = on_advance
        self._fault: BaseException | None = None
        self._end = divmod(vocab_size, 32)  # word and bit of the token that stands for the end
        self._stops = [(i // 32, np.uint32(1 << i % 32).view(np.int32)) for i in stop_ids]

    def advance(self, token: int) -> None:
        """Take the next token. Raises `RequestError` where the grammar does not allow it."""
        self._on_advance()
        with panics_are_errors():
            if self._matcher.consume_token(token):
                return
        raise RequestError(
            f"Token {token} is not in the answer's grammar: {_first_line(self._matcher)}. Either everything "
            "that the grammar allows here is banned (bad_words, bad_token_ids, logit_bias, a logits "
            "processor), or the grammar is too complex."
        )

    @property
    def complete(self) -> bool:
        """Whether nothing but the end can follow."""
        return self._matcher.is_stopped()

    @property
    def failure(self) -> BaseException | None:
        """What went wrong, once something has."""
        if self._fault is not None or not self._matcher.is_error():
            return self._fault
        return RequestError(f"The grammar cannot be followed any further: {_first_line(self._matcher)}")

    def _fill(self, mask: np.ndarray, row: int) -> None:
        try:
            fill_next_token_bitmask(self._matcher, mask, row)
        except BaseException as error:  # whatever it is, it is this sequence's alone
            self._fault = as_request_error(error)

    def _add_stops(self, row: np.ndarray) -> None:
        word, bit = self._end
        if row[word] >> bit & 1:
            for word, flag in self._stops:
                row[word] |= flag


def fill_masks(mask: np.ndarray, matchers: Sequence[tuple[int, Matcher]]) -> None:
    """Write the tokens that each matcher allows into its row of `mask` i32 [rows, words], a bit a token.

    A matcher that llguidance fails on tells of it as its `failure`; the others do not notice.
    """
    if len(matchers) <= _FEW or THREADS == 1 or not _filled_together(mask, matchers):
        for row, matcher in matchers:
            matcher._fill(mask, row)
    for row, matcher in matchers:
        matcher._add_stops(mask[row])


def _filled_together(mask: np.ndarray, matchers: Sequence[tuple[int, Matcher]]) -> bool:
    try:
        fill_next_token_bitmask_par(_executor(), [(m._matcher, row) for row, m in matchers], mask)
    except BaseException:
        return False  # one of them failed; filling them one by one shows which
    return True


@cache
def _executor() -> LLExecutor:
    return LLExecutor(THREADS)


def _first_line(matcher: LLMatcher) -> str:
    return matcher.get_error().split("\n<state>")[0].strip()
