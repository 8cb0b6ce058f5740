"""Top-k, top-p and min-p as one threshold per row: a token is kept where its score reaches the threshold.

The kept set is that of HuggingFace's TopKLogitsWarper, TopPLogitsWarper and MinPLogitsWarper applied in this
order. Tokens that tie with the last kept one are kept too: HF does so for top-k, and for top-p leaves it to
the order of an unstable sort. Scores are logits divided by the temperature, `-inf` where banned, never NaN.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jax import Array, lax

from lmdeploy_jax.sampling.params import SamplingBatch

IMPOSSIBLE = float(jnp.finfo(jnp.float32).min)  # score of what is banned, as `sampler` makes it finite


def candidate_threshold(top: Array, total: Array, batch: SamplingBatch) -> tuple[Array, Array]:
    """Threshold found from the K best scores alone, and whether it is the true one.

    `top` [R, K] holds the best scores in descending order and `total` [R] the sum of `exp(score - best)` over
    the whole vocabulary. Every score left out is at most `top[:, -1]`, so a threshold above it is exact;
    and any threshold is, where nothing left out is possible at all (a grammar allows few tokens).
    """
    limited = batch.top_k > 0
    last = jnp.clip(batch.top_k - 1, 0, top.shape[1] - 1)
    kth = jnp.take_along_axis(top, last[:, None], axis=1)[:, 0]
    kth = jnp.where(limited, kth, -jnp.inf)
    mass = jnp.where(top >= kth[:, None], jnp.exp(top - top[:, :1]), 0.0)
    total = jnp.where(limited, mass.sum(1), total)
    above = jnp.cumsum(mass, axis=1) - mass
    reached = above < (batch.top_p * total)[:, None]
    nucleus = jnp.where(reached, top, jnp.inf).min(1)
    # Where even all candidates hold too little mass, the nucleus ends among the scores left out.
    nucleus = jnp.where((batch.top_p < 1) & ~reached.all(1), nucleus, -jnp.inf)
    threshold = _combine(top[:, 0], kth, nucleus, batch)
    exact = jnp.where(limited, kth, threshold) > top[:, -1]
    return threshold, exact | (top[:, -1] <= IMPOSSIBLE)


def exact_threshold(scores: Array, batch: SamplingBatch) -> Array:
    """Threshold of every row of `scores` [R, V] without a sort; stages that no row asks for are skipped."""
    best = scores.max(1)
    keys = _ordered(scores)
    limited = (batch.top_k > 0) & (batch.top_k < scores.shape[1])
    nucleus = batch.top_p < 1

    def kth_score() -> Array:
        ones = jnp.ones(scores.shape, jnp.float32)
        return _largest_reaching(keys, ones, jnp.where(limited, batch.top_k, 1).astype(jnp.float32))

    def nucleus_end(floor: Array) -> Array:
        mass = jnp.where(scores >= floor[:, None], jnp.exp(scores - best[:, None]), 0.0)
        need = jnp.maximum(batch.top_p, 1e-30) * mass.sum(
            1
        )  # more than nothing: top_p = 0 keeps the best token
        return _largest_reaching(keys, mass, need)

    off = jnp.full(best.shape, -jnp.inf)
    kth = jnp.where(limited, lax.cond(limited.any(), kth_score, lambda: off), off)
    end = jnp.where(nucleus, lax.cond(nucleus.any(), nucleus_end, lambda _: off, kth), off)
    return _combine(best, kth, end, batch)


def _combine(best: Array, kth: Array, nucleus: Array, batch: SamplingBatch) -> Array:
    # p >= min_p * p_best, in logs. The best token is always kept, also under top_p = 0.
    small = best + jnp.log(batch.min_p)
    return jnp.minimum(best, jnp.maximum(jnp.maximum(kth, nucleus), small))


def _ordered(scores: Array) -> Array:
    """Maps f32 to u32 so that the integers compare as the floats do."""
    bits = lax.bitcast_convert_type(jnp.where(scores == 0, 0.0, scores), jnp.uint32)  # -0.0 equals 0.0
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _largest_reaching(keys: Array, weights: Array, need: Array) -> Array:
    """The largest value v of each row such that the weights of the keys >= v add up to `need`, as f32.

    Each of the 16 rounds settles two bits of v in one pass over the row; a sort of the vocabulary costs more
    than all of them. A GPU gets the rounds unrolled, since a loop would leave the CUDA graph; a CPU gets
    the loop, which compiles in a tenth of the time.
    """

    def settle(i: Array | int, found: Array) -> Array:
        shift = jnp.uint32(30) - 2 * jnp.asarray(i, jnp.uint32)
        base = found
        for digit in (1, 2, 3):
            trial = base | (jnp.uint32(digit) << shift)
            reached = jnp.where(keys >= trial[:, None], weights, 0.0).sum(1)
            found = jnp.where(reached >= need, trial, found)
        return found

    start = jnp.zeros(keys.shape[:1], jnp.uint32)
    found = lax.platform_dependent(
        start,
        cpu=lambda start: lax.fori_loop(0, 16, settle, start),
        default=lambda start: functools.reduce(lambda found, i: settle(i, found), range(16), start),
    )
    bits = jnp.where(found >> 31 == 1, found ^ jnp.uint32(1 << 31), ~found)
    return jnp.nan_to_num(lax.bitcast_convert_type(bits, jnp.float32), nan=-jnp.inf, neginf=-jnp.inf)
