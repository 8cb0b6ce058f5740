"""Next-token choice on the device: greedy, or a seeded draw after temperature, top-k, top-p and min-p."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax

from lmdeploy_jax.sampling.filters import candidate_threshold, exact_threshold
from lmdeploy_jax.sampling.params import SamplingBatch

SHORT_ROW = 2048  # elements that are sorted as they are
CANDIDATES = 128  # best scores looked at first; most rows that filter keep fewer tokens
NAN, EMPTY = -1, -2  # in a token's place: why there is none


def greedy(logits: Array) -> Array:
    """The best token of each row: `[R, V]` f32 -> `[R]` i32.

    A row with a NaN gives `NAN`, one in which every logit is -inf gives `EMPTY`. The search for the maximum
    tells both, so that they cost no pass over the logits of their own.
    """
    return _marked(*best_token(logits.astype(jnp.float32)))


def best_of_parts(tokens: Array, scores: Array) -> Array:
    """`greedy` of logits that are cut by columns, given each part's `best_token`: `[n, R]` -> i32 `[R]`.

    Tokens count from the first column of all; equal scores go to the first part.
    """
    part = jnp.argmax(scores, axis=0)[None]
    token, best = (jnp.take_along_axis(array, part, axis=0)[0] for array in (tokens, scores))
    return _marked(jnp.where((tokens < 0).any(0), NAN, token), best)


def _marked(token: Array, best: Array) -> Array:
    return jnp.where(token < 0, NAN, jnp.where(best == -jnp.inf, EMPTY, token))


def sample(logits: Array, batch: SamplingBatch) -> Array:
    """Draws a token per row: `[R, V]` f32 -> `[R]` i32; rows with temperature 0 take the best token.

    Rows that give no token are marked as `greedy` marks them.

    Gumbel-max over the kept tokens. A token's noise depends on its id and the row's seed and step only.
    Rows whose kept set lies within the best `CANDIDATES` tokens never touch the rest of the vocabulary, and
    the answer of a row is computed the same way whatever the other rows need.
    """
    best = greedy(logits)
    random = (batch.temperature > 0) & (best >= 0)
    scores = _scores(logits, batch.temperature)
    keys = jax.vmap(_row_key)(batch.seed, batch.step)
    filtered = (batch.top_k > 0) | (batch.top_p < 1) | (batch.min_p > 0)
    drawn, found = lax.cond(
        (random & filtered).any(),
        lambda: _draw_from_candidates(scores, keys, batch),
        lambda: (best, jnp.zeros(best.shape, bool)),
    )
    missing = random & ~found

    def from_vocabulary() -> Array:
        return jnp.where(missing, _draw_from_vocabulary(scores, keys, batch, missing), drawn)

    return jnp.where(random, lax.cond(missing.any(), from_vocabulary, lambda: drawn), best)


def _draw_from_candidates(scores: Array, keys: Array, batch: SamplingBatch) -> tuple[Array, Array]:
    # The barriers keep later slices of `top` apart: merged with them, a top_k is no longer seen as one by
    # XLA's CPU backend, which then sorts the whole vocabulary: 30 times the time. One for each array, since
    # one over the pair ends a program for several CPU devices in a failed check.
    top, ids = map(lax.optimization_barrier, _top_k(scores, min(CANDIDATES, scores.shape[1])))
    total = jnp.exp(scores - top[:, :1]).sum(1)
    threshold, found = candidate_threshold(top, total, batch)
    choice = _gumbel_argmax(top, threshold, keys, ids)
    return jnp.take_along_axis(ids, choice[:, None], axis=1)[:, 0], found


def _top_k(scores: Array, k: int) -> tuple[Array, Array]:
    """`lax.top_k`. A GPU sorts whole rows for it, so there they are short ones."""
    return lax.platform_dependent(
        scores, cpu=lambda scores: tuple(lax.top_k(scores, k)), default=partial(top_k_of_blocks, k=k)
    )


def top_k_of_blocks(scores: Array, k: int) -> tuple[Array, Array]:
    """`lax.top_k` of `scores` [R, V], ties too, by way of the k blocks of columns with the best maxima.

    Whatever is in another block, k elements come before it: the maxima of those. A few sorts of up to
    SHORT_ROW elements take a twentieth of the time that one of a large vocabulary does.
    """
    rows, columns = scores.shape
    if columns <= max(SHORT_ROW, 16 * k):
        values, ids = lax.top_k(scores, k)
        return values, ids
    width = 64 if columns >= max(8 * SHORT_ROW, 128 * k) else 8
    padded = jnp.pad(scores, ((0, 0), (0, -columns % width)), constant_values=-jnp.inf)
    blocks = padded.reshape(rows, -1, width)
    best = lax.sort(top_k_of_blocks(blocks.max(2), k)[1])  # in order of columns, as ties are
    values, index = top_k_of_blocks(jnp.take_along_axis(blocks, best[:, :, None], 1).reshape(rows, -1), k)
    block = jnp.take_along_axis(best, index // width, 1)
    return values, block * width + index % width


def _draw_from_vocabulary(scores: Array, keys: Array, batch: SamplingBatch, missing: Array) -> Array:
    """Rows that are not missing are not filtered, and their draws are not used."""
    missing_only = SamplingBatch(
        **{
            **vars(batch),
            "top_k": jnp.where(missing, batch.top_k, 0),
            "top_p": jnp.where(missing, batch.top_p, 1.0),
        }
    )
    ids = jnp.broadcast_to(jnp.arange(scores.shape[1], dtype=jnp.int32), scores.shape)
    return _gumbel_argmax(scores, exact_threshold(scores, missing_only), keys, ids)


def _gumbel_argmax(scores: Array, threshold: Array, keys: Array, ids: Array) -> Array:
    noise = jax.vmap(jax.vmap(_gumbel, (None, 0)))(keys, ids)
    noisy = jnp.where(scores >= threshold[:, None], scores + noise, -jnp.inf)
    return best_token(noisy)[0]


def best_token(values: Array) -> tuple[Array, Array]:
    """The first best column of each row of `values` [R, V], i32 [R], and what stands there; a negative one
    for a row that holds NaN.
    """

    def by_equality(
        values: Array,
    ) -> tuple[Array, Array]:  # two plain reductions: XLA's CPU argmax takes 7 times as long
        # Down the columns, which is the order of `linear.product` there. The barrier keeps the reductions
        # from computing the noise twice.
        values = lax.optimization_barrier(values.T)
        index, best = jnp.arange(len(values), dtype=jnp.int32)[:, None], values.max(0)
        index = jnp.where(values == best, index, len(values) - 1)
        # XLA's maximum over NaN is undefined on a CPU, so the second reduction looks for NaN.
        return jnp.where(jnp.isnan(values), -1, index).min(0), best

    def direct(values: Array) -> tuple[Array, Array]:
        index = jnp.argmax(values, axis=1).astype(jnp.int32)  # of the first NaN, if there is one
        best = jnp.take_along_axis(values, index[:, None], axis=1)[:, 0]
        return jnp.where(jnp.isnan(best), -1, index), best

    return lax.platform_dependent(values, cpu=by_equality, default=direct)


def _finite(logits: Array) -> Array:
    largest = float(jnp.finfo(jnp.float32).max)
    return jnp.nan_to_num(logits.astype(jnp.float32), nan=-jnp.inf, posinf=largest, neginf=-jnp.inf)


def _scores(logits: Array, temperature: Array) -> Array:
    divisor = jnp.where(temperature > 0, temperature, 1.0)
    return _finite(_finite(logits) / divisor[:, None])


def _row_key(seed: Array, step: Array) -> Array:
    return jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), step)


def _gumbel(key: Array, token: Array) -> Array:
    """Standard Gumbel noise of one token. One threefry block a token, so that any subset can be had alone."""
    bits = jax.random.key_data(jax.random.fold_in(key, token))[0]
    # The small uniforms make the large noise: f32 keeps them to 2^-33, and 1 - 2^-24 bounds the other end.
    uniform = jnp.minimum((bits.astype(jnp.float32) + 0.5) * 2.0**-32, 1 - 2.0**-24)
    return -jnp.log(-jnp.log1p(-uniform))
