"""How tokens choose among the experts of a mixture (Shazeer et al., 2017), as `RouterConfig` says."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float, Float32, Int32

from lmdeploy_jax.models.linear import param
from lmdeploy_jax.models.mlp_config import RouterConfig
from lmdeploy_jax.models.products import dense_product
from lmdeploy_jax.pallas_kernels.topk_routing import TopK, topk_routing


class Routes(NamedTuple):
    """Each token's experts, and what their outputs are multiplied by."""

    experts: Int32[Array, "T k"]
    weights: Float32[Array, "T k"]


class Router(nnx.Module):
    """The product that gives a token's logits, and the choice. Every device has all of it."""

    def __init__(self, hidden: int, config: RouterConfig, *, dtype: jnp.dtype, backend: str) -> None:
        self.config = config
        self.backend = backend
        wide = jnp.dtype("float32")
        self.weight = param((config.experts, hidden), wide if config.float32 else dtype, (None, "embed"))
        self.bias = param((config.experts,), wide, (None,)) if config.bias else None
        self.correction = param((config.experts,), wide, (None,)) if config.correction else None
        self.expert_scale = param((config.experts,), wide, (None,)) if config.expert_scale else None

    def __call__(self, x: Float[Array, "T E"]) -> Routes:
        weight = self.weight[...]
        logits = dense_product(x.astype(weight.dtype), weight, out_dtype=jnp.float32)
        bias, correction = (None if each is None else each[...] for each in (self.bias, self.correction))
        routes = choose(self.config, logits, correction, self.backend, bias=bias)
        if self.expert_scale is None:
            return routes
        return routes._replace(weights=routes.weights * self.expert_scale[...][routes.experts])


def choose(
    config: RouterConfig,
    logits: Float32[Array, "T X"],
    correction: Float32[Array, "X"] | None,
    backend: str = "xla",
    *,
    bias: Float32[Array, "X"] | None = None,
) -> Routes:
    """The routes of tokens with such logits, to which `bias` is added; among equals the expert of the lowest
    number goes first.
    """
    if config.scores == "sparsemixer":
        return _sparsemixer(logits if bias is None else logits + bias, config.jitter)
    options = TopK(
        config.per_token,
        config.scores,
        config.normalise,
        config.scale,
        config.groups,
        config.top_groups,
        config.group_score,
    )
    return Routes(*topk_routing(logits, correction, options, bias=bias, backend=backend))


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
