"""A draw gives a count and tokens: what the scheduler counted on beyond the count is given back."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from lmdeploy_jax.engine.core.results import accept, read_tokens
from lmdeploy_jax.engine.core.steps import Drawn
from lmdeploy_jax.engine.request import Request, SamplingParams, Sequence
from lmdeploy_jax.prompt import EncodedPrompt

PROMPT, MOST = [5, 6, 7], 3


def drawing(**params: object) -> Sequence:
    """A sequence as the scheduler leaves it, with `MOST` tokens under way from one step."""
    request = Request(
        EncodedPrompt(PROMPT), SamplingParams(**({"max_new_tokens": 20} | params)), lambda out: None
    )
    sequence = Sequence(request, 0, [*PROMPT, 8])
    sequence.computed, sequence.unread = len(sequence.tokens) + MOST - 1, MOST
    return sequence


@pytest.mark.parametrize("place", [list, jnp.asarray])
def test_counts_cut_rows_of_tokens(place):
    drawn = Drawn([(drawing(), 0), (drawing(), 1)], jnp.asarray([[1, 2, 3], [4, 0, 0], [0, 0, 0]]))
    drawn.counts, drawn.most = place([3, 1]), MOST
    assert read_tokens(drawn) == ([[1, 2, 3], [4]], None)


def test_packed_rows_begin_with_their_token():
    packed = np.arange(12).reshape(2, 6)
    tokens, rows = read_tokens(Drawn([(drawing(), 0)] * 2, packed, [1, 1], packed=True))
    assert tokens == [[0], [6]]
    assert np.array_equal(rows, packed)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_next_step_computes_the_last_token_that_came(count):
    sequence = drawing()
    accepted = accept(sequence, [9, 10, 11][:count], MOST, 100)
    assert accepted.tokens == sequence.tokens[len(PROMPT) + 1 :] == [9, 10, 11][:count]
    assert (sequence.unread, sequence.length, sequence.remaining) == (0, len(PROMPT) + 1 + count, 1)


def test_tokens_beyond_the_end_do_not_count():
    sequence = drawing(stop_token_ids=frozenset([10]))
    accepted = accept(sequence, [9, 10, 11], MOST, 100)
    assert (accepted.tokens, accepted.finish_reason, accepted.stop_token) == ([9, 10], "stop", 10)
    assert sequence.unread == 0
