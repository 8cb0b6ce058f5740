"""Penalties against HuggingFace's processor and OpenAI's formula; device counts against host counts."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from lmdeploy_jax.errors import RequestError
from lmdeploy_jax.sampling.penalties import PROMPT_FLAG, add_tokens, apply_penalties, bias_row, count_row
from tests.sampling.batches import make_batch

VOCAB = 97
PROMPTS = ([3, 3, 5, 96], [0], [7, 8])
GENERATED = ([5, 11, 11, 11], [], [7, 7, 96])
add = jax.jit(add_tokens)


def counts() -> jax.Array:
    return jnp.asarray(np.stack([count_row(p, g, VOCAB) for p, g in zip(PROMPTS, GENERATED, strict=True)]))


def logits() -> np.ndarray:
    return np.random.default_rng(0).normal(scale=4, size=(3, VOCAB)).astype(np.float32)


def test_repetition_penalty_is_hfs() -> None:
    penalties = [1.3, 1.0, 0.8]
    ours = apply_penalties(jnp.asarray(logits()), counts(), make_batch(3, repetition=penalties))
    for row, penalty in enumerate(penalties):
        ids = torch.tensor([PROMPTS[row] + GENERATED[row]])
        theirs = RepetitionPenaltyLogitsProcessor(penalty)(ids, torch.from_numpy(logits()[row : row + 1]))
        np.testing.assert_allclose(ours[row], theirs[0], rtol=1e-6)


def test_presence_and_frequency_are_openais_over_generated_tokens() -> None:
    presence, frequency = [0.5, 2.0, -1.0], [0.1, 1.0, 0.7]
    batch = make_batch(3, presence=presence, frequency=frequency)
    ours = apply_penalties(jnp.asarray(logits()), counts(), batch)
    expected = logits()
    for row, generated in enumerate(GENERATED):
        for token in set(generated):
            expected[row, token] -= frequency[row] * generated.count(token) + presence[row]
    np.testing.assert_allclose(ours, expected, rtol=1e-6, atol=1e-6)


def test_no_penalty_changes_no_bit_and_banned_stays_banned() -> None:
    raw = logits()
    raw[:, 5] = -np.inf
    np.testing.assert_array_equal(apply_penalties(jnp.asarray(raw), counts(), make_batch(3)), raw)
    batch = make_batch(3, repetition=1.5, presence=1.0, frequency=1.0)
    assert np.isneginf(apply_penalties(jnp.asarray(raw), counts(), batch)[:, 5]).all()


def test_tokens_added_on_the_device_equal_a_recount() -> None:
    start = jnp.asarray(np.stack([count_row(prompt, [], VOCAB) for prompt in PROMPTS]))
    all_slots = [[0, 2, -1], [2, 0, 3], [0, 0, 2], [1, 1, 9]]
    all_tokens = [[5, 7, 1], [7, 11, 1], [11, 11, 96], [-1, 97, 4]]
    for slots, tokens in zip(all_slots, all_tokens, strict=True):
        start = add(start, jnp.asarray(slots), jnp.asarray(tokens))
    np.testing.assert_array_equal(start, counts())


def test_count_row_marks_the_prompt_and_leaves_out_foreign_ids() -> None:
    row = count_row([1, 1, 200, -5], [1, 2, 2, 999], VOCAB)
    assert row.dtype == np.int32
    assert (row[1], row[2]) == (PROMPT_FLAG | 1, 2)
    assert np.count_nonzero(row) == 2
    assert not count_row([], [], VOCAB).any()


def test_bias_row_clamps_and_bans() -> None:
    row = bias_row(VOCAB, {1: 5.5, 2: 1e9, 3: -1e9, 4: 7.0}, iter([4, 96]))
    assert row.dtype == np.float32
    np.testing.assert_array_equal(row[[0, 1, 2, 3, 4, 96]], [0, 5.5, 100, -100, -np.inf, -np.inf])
    assert not bias_row(VOCAB, {}, []).any()


def test_bias_row_names_what_is_wrong() -> None:
    with pytest.raises(RequestError, match=r"\[-1, 97, 500\].*0 to 96"):
        bias_row(VOCAB, {97: 1.0, 3: 1.0}, [500, -1])
    with pytest.raises(RequestError, match=r"\[3\] is NaN"):
        bias_row(VOCAB, {3: float("nan")}, [])
