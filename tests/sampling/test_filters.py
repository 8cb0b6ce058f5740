"""The kept set against HuggingFace's warpers, on both ways to find the threshold."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from lmdeploy_jax.sampling.filters import candidate_threshold, exact_threshold
from tests.sampling.batches import make_batch

K = 128
exact = jax.jit(exact_threshold)
candidates = jax.jit(candidate_threshold)

SETTINGS = [
    {"top_k": 1},
    {"top_k": 40},
    {"top_k": 500},
    {"top_k": 10**6},
    {"top_p": 0.9},
    {"top_p": 0.5},
    {"top_p": 1e-6},
    {"top_p": 0.0},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"top_k": 50, "top_p": 0.8},
    {"top_k": 300, "top_p": 0.95, "min_p": 0.02},
    {"top_p": 0.9, "min_p": 0.05},
    {"temperature": 0.3, "top_k": 50, "top_p": 0.9, "min_p": 0.01},
    {"temperature": 2.0, "top_p": 0.7},
    {},
]


def hf_kept(logits: np.ndarray, settings: dict) -> np.ndarray:
    """Kept mask [V] of one row, in float64 so that HF's own sums do not blur the edge of the nucleus."""
    warpers = [TemperatureLogitsWarper(settings.get("temperature", 1.0))]
    if settings.get("top_k"):
        warpers.append(TopKLogitsWarper(settings["top_k"]))
    if "top_p" in settings:
        warpers.append(TopPLogitsWarper(settings["top_p"]))
    if "min_p" in settings:
        warpers.append(MinPLogitsWarper(settings["min_p"]))
    scores = torch.from_numpy(logits.astype(np.float64))[None]
    for warper in warpers:
        scores = warper(None, scores)
    return ~torch.isneginf(scores[0]).numpy()


def scored(logits: np.ndarray, rows: list[dict]) -> jax.Array:
    temperature = np.array([row.get("temperature", 1.0) for row in rows], np.float32)
    return jnp.asarray(logits / temperature[:, None])


def as_batch(rows: list[dict]):
    fields = ("temperature", "top_k", "top_p", "min_p")
    default = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    return make_batch(len(rows), **{name: [row.get(name, default[name]) for row in rows] for name in fields})


def assert_kept(logits: np.ndarray, kept: np.ndarray, settings: dict) -> None:
    """Equal to HF's set, but for ties with the last kept token, which HF's sort splits at random."""
    expected = hf_kept(logits, settings)
    assert kept[expected].all(), settings
    extra = kept & ~expected
    assert np.isin(logits[extra], logits[expected].min()).all(), (settings, extra.sum())


@pytest.mark.parametrize("spread", [0.5, 2.5, 12.0])
def test_exact_threshold_keeps_what_hf_keeps(spread: float) -> None:
    logits = np.random.default_rng(1).normal(scale=spread, size=(len(SETTINGS), 2048)).astype(np.float32)
    scores = scored(logits, SETTINGS)
    kept = np.asarray(scores >= exact(scores, as_batch(SETTINGS))[:, None])
    for row, settings in enumerate(SETTINGS):
        np.testing.assert_array_equal(kept[row], hf_kept(logits[row], settings), str(settings))


@pytest.mark.parametrize("spread", [2.5, 12.0])
def test_candidates_are_right_whenever_they_say_so(spread: float) -> None:
    logits = np.random.default_rng(2).normal(scale=spread, size=(len(SETTINGS), 2048)).astype(np.float32)
    scores = scored(logits, SETTINGS)
    top = -jnp.sort(-scores, axis=1)[:, :K]
    total = jnp.exp(scores - top[:, :1]).sum(1)
    threshold, found = candidates(top, total, as_batch(SETTINGS))
    kept = np.asarray(scores >= threshold[:, None])
    for row, settings in enumerate(SETTINGS):
        if settings.get("top_k", 0) < K:
            assert bool(found[row]) == (hf_kept(logits[row], settings).sum() < K), settings
        if found[row]:
            assert_kept(logits[row], kept[row], settings)


def test_ties_are_kept_together_on_both_paths() -> None:
    # bfloat16 heads give many equal logits.
    logits = np.round(np.random.default_rng(3).normal(scale=2, size=(len(SETTINGS), 2048)) * 4) / 4
    logits = logits.astype(np.float32)
    scores = scored(logits, SETTINGS)
    batch = as_batch(SETTINGS)
    top = -jnp.sort(-scores, axis=1)[:, :K]
    near, found = candidates(top, jnp.exp(scores - top[:, :1]).sum(1), batch)
    far = exact(scores, batch)
    kept_near, kept_far = (np.asarray(scores >= threshold[:, None]) for threshold in (near, far))
    assert found.any()
    assert not found.all()
    for row, settings in enumerate(SETTINGS):
        assert_kept(logits[row], kept_far[row], settings)
        if found[row]:
            np.testing.assert_array_equal(kept_near[row], kept_far[row], str(settings))


def test_extreme_scores() -> None:
    largest = float(np.finfo(np.float32).max)
    rows = [
        [0.0, -0.0, -np.inf, -np.inf, -np.inf],  # both zeros are one value
        [largest, -largest, 0.0, 1e-38, -1e-38],
        [-np.inf, -np.inf, -5.0, -np.inf, -np.inf],
        [-3e38, -3.1e38, -3.2e38, -3.3e38, -3.4e38],
    ]
    scores = np.array(rows, np.float32)
    settings = [{"top_k": 1}, {"top_k": 2}, {"top_k": 3, "top_p": 0.5}, {"top_p": 0.9, "min_p": 0.1}]
    kept = np.asarray(scores >= np.asarray(exact(jnp.asarray(scores), as_batch(settings)))[:, None])
    finite = np.isfinite(scores)
    expected = [[1, 1, 0, 0, 0], [1, 0, 1, 0, 0], [0, 0, 1, 0, 0], [1, 0, 0, 0, 0]]
    # Denormals count as zero on most devices, so row 1's second best is any of 0 and 1e-38.
    assert kept[1, 0]
    assert not kept[1, 1]
    for row in (0, 2, 3):
        np.testing.assert_array_equal(kept[row] & finite[row], np.array(expected[row], bool), str(row))


def test_a_real_vocabulary_size() -> None:
    logits = np.random.default_rng(4).normal(scale=2.5, size=(3, 151_937)).astype(np.float32)
    rows = [{"top_k": 5000}, {"top_p": 0.95}, {"top_k": 2000, "top_p": 0.5, "min_p": 1e-4}]
    scores = jnp.asarray(logits)
    threshold = np.asarray(exact(scores, as_batch(rows)))
    for row, settings in enumerate(rows):
        kept, expected = logits[row] >= threshold[row], hf_kept(logits[row], settings)
        # f32 sums over 152k terms move the edge of the nucleus by a few of its tens of thousands of tokens.
        slack = 1e-4 * expected.sum() if "top_p" in settings else 0
        assert (kept != expected).sum() <= slack, settings
