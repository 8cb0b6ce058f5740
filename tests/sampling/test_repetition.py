"""The n-gram stop against a count over the whole window."""

from __future__ import annotations

import random

import pytest

from lmdeploy_jax.errors import RequestError
from lmdeploy_jax.sampling.repetition import NgramStop


def occurrences(tokens: list[int], size: int, window: int) -> int:
    recent = tokens[-window:]
    return sum(recent[i : i + size] == tokens[-size:] for i in range(len(recent) - size + 1))


@pytest.mark.parametrize(
    ("size", "threshold", "window"), [(1, 3, 5), (2, 2, 8), (3, 2, 1024), (4, 3, 20), (5, 1, 5)]
)
def test_equals_a_recount_after_every_token(size: int, threshold: int, window: int) -> None:
    draw = random.Random(size)
    stop = NgramStop(size, threshold, window)
    tokens: list[int] = []
    fired = set()
    for _ in range(400):
        tokens.append(draw.randrange(3))
        expected = len(tokens) >= size and occurrences(tokens, size, window) >= threshold
        assert stop.feed(tokens[-1]) == expected
        fired.add(expected)
    assert True in fired


@pytest.mark.parametrize(("size", "threshold"), [(0, 3), (3, 0), (-1, 2)])
def test_switched_off(size: int, threshold: int) -> None:
    stop = NgramStop(size, threshold)
    assert not any(stop.feed(1) for _ in range(100))


def test_ngram_longer_than_the_window_is_refused() -> None:
    with pytest.raises(RequestError, match="repetition_ngram_size 9"):
        NgramStop(9, 2, window=8)
