"""How tokens choose among the experts of a mixture (Shazeer et al., 2017), as `RouterConfig` says."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float, Float32, Int32

from lmdeploy_jax.models.config import RouterConfig
from lmdeploy_jax.models.linear import param
from lmdeploy_jax.models.products import dense_product

LEAST_SUM = 1e-20  # of weights that are divided by their sum, which sigmoids may all but lose


class Routes(NamedTuple):
    """Each token's experts, and what their outputs are multiplied by."""

    experts: Int32[Array, "T k"]
    weights: Float32[Array, "T k"]


class Router(nnx.Module):
    """The product that gives a token's logits, and the choice. Every device has all of it."""

    def __init__(self, hidden: int, config: RouterConfig, *, dtype: jnp.dtype) -> None:
        self.config = config
        wide = jnp.dtype("float32")
        self.weight = param((config.experts, hidden), wide if config.float32 else dtype, (None, "embed"))
        self.bias = param((config.experts,), wide, (None,)) if config.bias else None
        self.correction = param((config.experts,), wide, (None,)) if config.correction else None

    def __call__(self, x: Float[Array, "T E"]) -> Routes:
        weight = self.weight[...]
        logits = dense_product(x.astype(weight.dtype), weight, out_dtype=jnp.float32)
        logits = logits if self.bias is None else logits + self.bias[...]
        return choose(self.config, logits, None if self.correction is None else self.correction[...])


def choose(
    config: RouterConfig, logits: Float32[Array, "T X"], correction: Float32[Array, "X"] | None
) -> Routes:
    """The routes of tokens with such logits; among equals the expert of the lowest number goes first."""
    if config.scores == "sparsemixer":
        return _sparsemixer(logits, config.jitter)
    scores = _scores(config, logits)
    ranked = scores if correction is None else scores + correction
    if config.groups > 1:
        ranked = _within_best_groups(config, ranked)
    experts = jax.lax.top_k(ranked, config.per_token)[1]
    weights = jnp.take_along_axis(scores, experts, axis=1)
    if config.scores == "chosen":
        weights = jax.nn.softmax(weights, axis=1)
    if config.normalise:
        weights = weights / (weights.sum(1, keepdims=True) + LEAST_SUM)
    return Routes(experts, weights * config.scale)


def _scores(config: RouterConfig, logits: Float32[Array, "T X"]) -> Float32[Array, "T X"]:
    if config.scores == "sigmoid":
        return jax.nn.sigmoid(logits)
    return logits if config.scores == "chosen" else jax.nn.softmax(logits, axis=1)


def _within_best_groups(config: RouterConfig, ranked: Float32[Array, "T X"]) -> Float32[Array, "T X"]:
    """Experts outside of the best groups come last."""
    tokens, count = ranked.shape
    grouped = ranked.reshape(tokens, config.groups, count // config.groups)
    best = jax.lax.top_k(grouped, 1 if config.group_score == "max" else 2)[0].sum(-1)
    chosen = jax.lax.top_k(best, config.top_groups)[1]
    kept = (chosen[:, :, None] == jnp.arange(config.groups)).any(1)
    return jnp.where(kept[:, :, None], grouped, -jnp.inf).reshape(tokens, count)


def _sparsemixer(logits: Float32[Array, "T X"], jitter: float) -> Routes:
    """The best two, each weighed by a softmax over the logits near it (Liu et al., 2024)."""
    found, left = [], logits
    for _ in range(2):
        best = left.max(1, keepdims=True)
        expert = left.argmax(1, keepdims=True)
        far = (best - logits) / jnp.maximum(jnp.abs(logits), best) > 2 * jitter
        near = jax.nn.softmax(jnp.where(far, -jnp.inf, left), axis=1)
        found.append((expert, jnp.take_along_axis(near, expert, axis=1)))
        left = jnp.where(jnp.arange(logits.shape[1]) == expert, -jnp.inf, left)
    experts, weights = (jnp.concatenate(each, axis=1) for each in zip(*found, strict=True))
    return Routes(experts.astype(jnp.int32), weights)
