"""The choice of experts as plain XLA operations; on a GPU a sort and five small kernels."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32

from lmdeploy_jax.pallas_kernels.topk_routing.options import LEAST_SUM, TopK


def topk_routing(
    logits: Float32[Array, "T X"], correction: Float32[Array, "X"] | None, options: TopK
) -> tuple[Int32[Array, "T k"], Float32[Array, "T k"]]:
    """See `lmdeploy_jax.pallas_kernels.topk_routing`."""
    scores = _scores(options, logits)
    ranked = scores if correction is None else scores + correction
    if options.groups > 1:
        ranked = _within_best_groups(options, ranked)
    experts = jax.lax.top_k(ranked, options.count)[1]
    weights = jnp.take_along_axis(scores, experts, axis=1)
    if options.scores == "chosen":
        weights = jax.nn.softmax(weights, axis=1)
    if options.normalise:
        weights = weights / (weights.sum(1, keepdims=True) + LEAST_SUM)
    return experts, weights * options.scale


def _scores(options: TopK, logits: Float32[Array, "T X"]) -> Float32[Array, "T X"]:
    if options.scores == "sigmoid":
        return jax.nn.sigmoid(logits)
    return logits if options.scores == "chosen" else jax.nn.softmax(logits, axis=1)


def _within_best_groups(options: TopK, ranked: Float32[Array, "T X"]) -> Float32[Array, "T X"]:
    """Experts outside of the best groups come last."""
    tokens, count = ranked.shape
    grouped = ranked.reshape(tokens, options.groups, count // options.groups)
    best = jax.lax.top_k(grouped, 1 if options.group_score == "max" else 2)[0].sum(-1)
    chosen = jax.lax.top_k(best, options.top_groups)[1]
    kept = (chosen[:, :, None] == jnp.arange(options.groups)).any(1)
    return jnp.where(kept[:, :, None], grouped, -jnp.inf).reshape(tokens, count)
