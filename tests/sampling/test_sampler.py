"""Draws: their distribution, and that a row's token depends on nothing but the row."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmdeploy_jax.sampling.sampler import (
    EMPTY,
    NAN,
    best_of_parts,
    best_token,
    greedy,
    sample,
    top_k_of_blocks,
)
from tests.sampling.batches import make_batch

sample_jit = jax.jit(sample)
DRAWS = 8000
ROWS, VOCAB = 40, 1001  # one shape for most tests: one compilation


def chi_square(tokens: np.ndarray, probabilities: np.ndarray) -> float:
    expected = probabilities * tokens.size
    observed = np.bincount(tokens, minlength=probabilities.size)
    assert observed[probabilities == 0].sum() == 0
    kept = probabilities > 0
    return float((((observed - expected) ** 2)[kept] / expected[kept]).sum())


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def test_draws_follow_the_softmax() -> None:
    logits = np.full(200, -np.inf, np.float32)
    logits[[3, 17, 18, 64, 150, 151, 199]] = [2.0, 1.0, 0.5, 0.0, -1.0, -2.0, 1.5]
    rows = jnp.broadcast_to(jnp.asarray(logits), (DRAWS, 200))
    tokens = sample_jit(rows, make_batch(DRAWS, seed=np.arange(DRAWS)))
    # 6 degrees of freedom: chance passes 22.5 once in a thousand times, and the seeds are fixed.
    assert chi_square(np.asarray(tokens), softmax(logits)) < 22.5


def test_filtered_draws_over_steps_follow_the_renormalised_softmax() -> None:
    logits = np.random.default_rng(0).normal(scale=3, size=200).astype(np.float32)
    temperature, top_k = 0.7, 6
    batch = make_batch(DRAWS, seed=7, step=np.arange(DRAWS), temperature=temperature, top_k=top_k)
    tokens = sample_jit(jnp.broadcast_to(jnp.asarray(logits), (DRAWS, 200)), batch)
    scores = logits / temperature
    scores[scores < np.sort(scores)[-top_k]] = -np.inf
    assert chi_square(np.asarray(tokens), softmax(scores)) < 20.6  # 5 degrees of freedom, one in a thousand


def mixed_rows(rows: int) -> dict[str, np.ndarray]:
    """Rows of every kind: greedy, unfiltered, within the candidates, beyond them."""
    kinds = np.arange(rows) % 5
    return {
        "temperature": np.where(kinds == 0, 0.0, 0.5 + 0.25 * kinds),
        "top_k": np.select([kinds == 2, kinds == 3], [40, 400], 0),
        "top_p": np.where(kinds >= 3, 0.9, 1.0),
        "min_p": np.where(kinds == 2, 0.01, 0.0),
        "seed": np.arange(rows) * 7919,
        "step": np.arange(rows) % 11,
    }


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    rows, vocab = ROWS, VOCAB
    logits = np.random.default_rng(5).normal(scale=2, size=(rows, vocab)).astype(np.float32)
    fields = mixed_rows(rows)
    together = np.asarray(sample_jit(jnp.asarray(logits), make_batch(rows, **fields)))
    order = np.random.default_rng(6).permutation(rows)
    shuffled = make_batch(rows, **{name: column[order] for name, column in fields.items()})
    np.testing.assert_array_equal(sample_jit(jnp.asarray(logits[order]), shuffled), together[order])
    for row in range(10):
        alone = make_batch(1, **{name: column[row] for name, column in fields.items()})
        assert int(sample_jit(jnp.asarray(logits[row : row + 1]), alone)[0]) == together[row]
    greedy_rows = fields["temperature"] == 0
    np.testing.assert_array_equal(together[greedy_rows], logits[greedy_rows].argmax(1))


def test_a_filter_that_drops_other_tokens_leaves_the_draw() -> None:
    """Noise belongs to the token: where the unfiltered draw survives the filter, it stays the draw."""
    rows, vocab = ROWS, VOCAB
    logits = jnp.asarray(np.random.default_rng(8).normal(scale=3, size=(rows, vocab)), jnp.float32)
    seeds = np.arange(rows)
    free = np.asarray(sample_jit(logits, make_batch(rows, seed=seeds)))
    for top_k in (50, 500):  # within the candidates, and beyond them
        limited = np.asarray(sample_jit(logits, make_batch(rows, seed=seeds, top_k=top_k)))
        rank = (np.asarray(logits) > np.take_along_axis(np.asarray(logits), free[:, None], 1)).sum(1)
        survives = rank < top_k
        assert survives.sum() > rows // 4
        np.testing.assert_array_equal(limited[survives], free[survives])


def test_seed_and_step_both_change_the_draw() -> None:
    logits = jnp.zeros((ROWS, VOCAB), jnp.float32)
    one = np.asarray(sample_jit(logits, make_batch(ROWS, seed=np.arange(ROWS))))
    other = np.asarray(sample_jit(logits, make_batch(ROWS, seed=np.arange(ROWS), step=1)))
    large = np.asarray(sample_jit(logits, make_batch(ROWS, seed=np.arange(ROWS) + 2**31)))
    assert len(set(one)) > 32
    assert (one != other).sum() > 35
    assert (one != large).sum() > 35


def test_top_k_one_and_tiny_top_p_are_greedy() -> None:
    logits = jnp.asarray(np.random.default_rng(9).normal(size=(ROWS, VOCAB)), jnp.float32)
    best = np.asarray(logits).argmax(1)
    for fields in ({"top_k": 1}, {"top_p": 1e-7}, {"top_p": 0.0}, {"min_p": 1.0}, {"temperature": 1e-6}):
        np.testing.assert_array_equal(
            sample_jit(logits, make_batch(ROWS, seed=np.arange(ROWS), **fields)), best
        )
    np.testing.assert_array_equal(jax.jit(greedy)(logits), best)


def test_rows_without_a_distribution_are_marked_and_the_others_never_out_of_range() -> None:
    rows = np.random.default_rng(10).normal(size=(ROWS, VOCAB)).astype(np.float32)
    rows[0] = np.nan
    rows[1, ::2] = np.nan
    rows[2] = -np.inf
    rows[3, 7] = np.inf
    rows[4] = np.inf
    rows[5, -1] = rows[6, 0] = np.nan
    for fields in ({"temperature": 0.0}, {}, {"top_k": 40}, {"top_p": 0.99}, {"top_k": 700, "min_p": 0.01}):
        tokens = np.asarray(sample_jit(jnp.asarray(rows), make_batch(ROWS, **fields)))
        assert (tokens[:3] == [NAN, NAN, EMPTY]).all(), fields
        assert (tokens[5:7] == NAN).all(), fields
        assert tokens[3] == 7, fields
        assert ((tokens[7:] >= 0) & (tokens[7:] < VOCAB)).all(), fields


def test_the_best_of_all_parts_is_the_best_of_the_whole() -> None:
    """Logits cut by columns, as several devices have them: with ties over parts, NaN and empty rows."""
    rows = np.random.default_rng(4).integers(0, 9, (ROWS, 4, 25)).astype(np.float32)
    rows[0, 3, 7] = rows[1, 0, 0] = np.nan
    rows[2], rows[3, :3] = -np.inf, -np.inf
    parts = jnp.asarray(rows.swapaxes(0, 1))
    tokens, scores = jax.vmap(best_token)(parts)
    tokens = jnp.where(tokens < 0, tokens, tokens + 25 * jnp.arange(4)[:, None])
    found = best_of_parts(tokens, scores)
    np.testing.assert_array_equal(found, greedy(jnp.asarray(rows.reshape(ROWS, -1))))
    assert list(found[:3]) == [NAN, NAN, EMPTY]


def test_banned_tokens_are_never_drawn() -> None:
    logits = np.full((ROWS, VOCAB), -np.inf, np.float32)
    logits[:, 123] = -50.0
    batch = make_batch(ROWS, seed=np.arange(ROWS))
    np.testing.assert_array_equal(sample_jit(jnp.asarray(logits), batch), 123)


@pytest.mark.parametrize("columns", [128, 2048, 2049, 2100, 16383, 16385, 32003])
def test_the_best_of_blocks_are_the_best(columns: int) -> None:
    """Among few values there are ties everywhere, within blocks and between them."""
    rng = np.random.default_rng(columns)
    scores = rng.integers(0, 9, (5, columns)).astype(np.float32)
    scores[1] = rng.standard_normal(columns)
    scores[2, 100:] = -np.inf
    scores[3] = -np.inf
    scores[4] = np.sort(rng.standard_normal(columns))
    wanted = jax.lax.top_k(scores, 128)
    for found, true in zip(top_k_of_blocks(jnp.asarray(scores), 128), wanted, strict=True):
        np.testing.assert_array_equal(found, true)


def test_the_gpu_program_has_no_loop() -> None:
    """A while loop would break the step's CUDA graph apart."""
    shapes = jax.ShapeDtypeStruct((4, VOCAB), jnp.float32), make_batch(4)
    for platform, loops in (("cuda", False), ("cpu", True)):
        text = jax.jit(sample).trace(*shapes).lower(lowering_platforms=(platform,)).as_text()
        assert ("stablehlo.while" in text) == loops, platform
