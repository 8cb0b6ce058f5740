"""Log-probabilities of the raw logits: what the model believes, before penalties, biases and temperature."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

MAX_LOGPROBS = 20


class TopLogprobs(NamedTuple):
    """Log-probabilities of N rows, natural logarithm."""

    token_logprob: Array  # [N] f32, the chosen token's
    ids: Array  # [N, k] i32, the k most likely tokens, best first
    logprobs: Array  # [N, k] f32, theirs


def top_logprobs(logits: Array, tokens: Array, k: int = MAX_LOGPROBS) -> TopLogprobs:
    """The chosen tokens' and the `k` best log-probabilities of each row.

    Shapes: `logits` [N, V], `tokens` [N]. `k` is cut to V. Token ids out of range (padding) are clamped.
    """
    logits = logits.astype(jnp.float32)
    norm = jax.nn.logsumexp(logits, axis=1)
    values, ids = lax.top_k(logits, min(k, logits.shape[1]))
    chosen = jnp.clip(tokens, 0, logits.shape[1] - 1)[:, None]
    own = jnp.take_along_axis(logits, chosen, axis=1)[:, 0]
    return TopLogprobs(own - norm, ids.astype(jnp.int32), values - norm[:, None])


def no_logprobs(logits: Array, k: int = MAX_LOGPROBS) -> TopLogprobs:
    """Zeros in the shapes of `top_logprobs`, for rows of which nobody asks for any."""
    rows, width = logits.shape[0], min(k, logits.shape[1])
    ids = jnp.zeros((rows, width), jnp.int32)
    return TopLogprobs(jnp.zeros(rows, jnp.float32), ids, jnp.zeros((rows, width), jnp.float32))
