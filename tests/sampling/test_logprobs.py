"""Log-probabilities against torch's log_softmax."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import torch

from lmdeploy_jax.sampling.logprobs import MAX_LOGPROBS, top_logprobs


def test_top_and_chosen_log_probabilities() -> None:
    logits = np.random.default_rng(0).normal(scale=5, size=(4, 1501)).astype(np.float32)
    tokens = np.array([0, 1500, 7, int(logits[3].argmax())], np.int32)
    expected = torch.log_softmax(torch.from_numpy(logits), dim=1)
    values, ids = expected.topk(MAX_LOGPROBS, dim=1)
    ours = jax.jit(top_logprobs)(jnp.asarray(logits), jnp.asarray(tokens))
    np.testing.assert_allclose(ours.token_logprob, expected[np.arange(4), tokens], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(ours.ids, ids)
    np.testing.assert_allclose(ours.logprobs, values, rtol=1e-5, atol=1e-5)
    assert ours.ids.dtype == jnp.int32


def test_targets_give_the_cross_entropy_of_torch() -> None:
    logits = np.random.default_rng(1).normal(scale=3, size=(9, 33)).astype(np.float32)
    targets = np.arange(9, dtype=np.int32) * 3
    ours = top_logprobs(jnp.asarray(logits), jnp.asarray(targets), k=1)
    loss = torch.nn.functional.cross_entropy(torch.from_numpy(logits), torch.from_numpy(targets).long())
    np.testing.assert_allclose(-ours.token_logprob.mean(), loss, rtol=1e-5)


def test_small_vocabulary_padding_and_wide_range() -> None:
    logits = jnp.asarray([[1000.0, 0.0, -jnp.inf], [0.0, 0.0, 0.0]], jnp.float32)
    ours = top_logprobs(logits, jnp.asarray([0, -1]))
    assert ours.ids.shape == (2, 3)
    np.testing.assert_allclose(ours.token_logprob, [0.0, -np.log(3)], rtol=1e-6)
    assert np.isneginf(ours.logprobs[0, 2])
