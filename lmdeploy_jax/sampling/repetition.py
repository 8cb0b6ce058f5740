"""Stops a sequence that says the same thing over and over."""

from __future__ import annotations

from collections import Counter, deque

from lmdeploy_jax.errors import RequestError


class NgramStop:
    """Tells when the last n-gram has occurred `threshold` times within the last `window` tokens.

    Occurrences may overlap, and the last one counts. A `size` or `threshold` of 0 or less switches it off.
    Each token costs O(size) time, whatever the window.
    """

    def __init__(self, size: int, threshold: int, window: int = 1024) -> None:
        if size > window:
            raise RequestError(f"repetition_ngram_size {size} is larger than the window of {window} tokens.")
        self.enabled = size > 0 and threshold > 0
        self._threshold = threshold
        self._last: deque[int] = deque(maxlen=max(size, 0))
        self._capacity = window - size + 1
        self._ngrams: deque[tuple[int, ...]] = deque()
        self._counts: Counter[tuple[int, ...]] = Counter()

    def feed(self, token: int) -> bool:
        """Takes the next generated token; True where the sequence should stop."""
        if not self.enabled:
            return False
        self._last.append(token)
        if len(self._last) < self._last.maxlen:  # type: ignore[operator]
            return False
        ngram = tuple(self._last)
        self._ngrams.append(ngram)
        self._counts[ngram] += 1
        if len(self._ngrams) > self._capacity:
            self._forget(self._ngrams.popleft())
        return self._counts[ngram] >= self._threshold

    def _forget(self, ngram: tuple[int, ...]) -> None:
        self._counts[ngram] -= 1
        if not self._counts[ngram]:
            del self._counts[ngram]
