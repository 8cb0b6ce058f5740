"""Grammar masks against numpy's bits; draws from a row of which little is allowed."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmdeploy_jax.sampling.filters import candidate_threshold, exact_threshold
from lmdeploy_jax.sampling.mask import apply_mask, mask_words
from lmdeploy_jax.sampling.sampler import sample
from tests.sampling.batches import make_batch


@pytest.mark.parametrize("vocab", [1, 31, 32, 33, 500])
def test_forbidden_tokens_are_impossible_and_the_others_untouched(vocab):
    rng = np.random.default_rng(vocab)
    logits = rng.normal(size=(3, vocab)).astype(np.float32)
    mask = rng.integers(-(2**31), 2**31, (3, mask_words(vocab))).astype(np.int32)
    mask[0] = -1
    bits = np.unpackbits(mask.view(np.uint8), axis=1, bitorder="little")[:, :vocab]
    got = np.asarray(jax.jit(apply_mask)(logits, mask))
    assert np.array_equal(got, np.where(bits == 1, logits, -np.inf))
    assert np.array_equal(got[0], logits[0])


def test_the_best_scores_suffice_where_nothing_else_is_possible():
    rng = np.random.default_rng(0)
    scores = np.full((4, 1000), np.finfo(np.float32).min, np.float32)
    for row, count in enumerate((1, 3, 40, 100)):
        scores[row, rng.choice(1000, count, replace=False)] = rng.normal(size=count)
    batch = make_batch(4, temperature=1.0, top_k=50, top_p=0.9)
    top = jax.lax.top_k(jnp.asarray(scores), 128)[0]
    total = jnp.exp(scores - top[:, :1]).sum(1)
    threshold, found = candidate_threshold(top, total, batch)
    assert found.all()
    exact = exact_threshold(jnp.asarray(scores), batch)
    assert np.array_equal(scores >= threshold[:, None], scores >= exact[:, None])


@pytest.mark.parametrize("settings", [{}, {"top_k": 50}, {"top_p": 0.5}, {"top_k": 5, "min_p": 0.1}])
def test_only_allowed_tokens_are_drawn(settings):
    rng = np.random.default_rng(1)
    rows, vocab = 64, 700
    logits = rng.normal(size=(rows, vocab)).astype(np.float32) * 4
    allowed = [set(rng.choice(vocab, 1 + row % 5, replace=False).tolist()) for row in range(rows)]
    for row, ids in enumerate(allowed):
        logits[row, [i for i in range(vocab) if i not in ids]] = -np.inf
    batch = make_batch(rows, temperature=1.5, seed=np.arange(rows), **settings)
    tokens = np.asarray(jax.jit(sample)(logits, batch)).tolist()
    assert all(token in ids for token, ids in zip(tokens, allowed, strict=True))
