"""How tokens choose among the experts of a mixture (Shazeer et al., 2017), as `RouterConfig` says."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float, Float32, Int32

from lmdeploy_jax.models.kernels import Kernels
from lmdeploy_jax.models.linear import param
from lmdeploy_jax.models.mlp_config import RouterConfig
from lmdeploy_jax.models.norm import Norm, RMSNorm
from lmdeploy_jax.models.products import dense_product
from lmdeploy_jax.models.residual import Delta, PartialSum
from lmdeploy_jax.pallas_kernels.skinny_gemm import Tiling, skinny_gemm
from lmdeploy_jax.pallas_kernels.topk_routing import TopK, norm_topk_routing, topk_routing

FEW_TOKENS = 64  # whose product XLA would cut along the inner axis too, and add up in a kernel more
MOST_PARTS = 16


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
        logits = self.logits(x)
        bias, correction = (None if each is None else each[...] for each in (self.bias, self.correction))
        routes = choose(self.config, logits, correction, self.backend, bias=bias)
        if self.expert_scale is None:
            return routes
        return routes._replace(weights=routes.weights * self.expert_scale[...][routes.experts])

    def behind_norm(
        self, kernels: Kernels, x: Float[Array, "T E"], delta: Delta | None, norm: Norm | None
    ) -> tuple[Float[Array, "T E"], Float[Array, "T E"], Routes]:
        """`Kernels.add_norm` of the last three -> x, x normalised, and its routes."""
        one = kernels.tuning.routing == "pallas" and self.backend != "xla" and x.shape[0] <= FEW_TOKENS
        plain = self.expert_scale is None and self.config.scores != "sparsemixer"
        if (
            not (one and plain and isinstance(norm, RMSNorm))
            or delta is None
            or isinstance(delta, PartialSum)
        ):
            x, normed = kernels.add_norm(x, delta, norm)
            return x, normed, self(normed)
        bias, correction = (None if each is None else each[...] for each in (self.bias, self.correction))
        how: Any = {"bias": bias, "eps": norm.eps, "offset": norm.offset, "backend": self.backend}
        arrays = (x, delta, norm.weight[...], self.weight[...], correction, options_of(self.config))
        x, normed, *routes = norm_topk_routing(*arrays, **how)
        return x, normed, Routes(*routes)

    def logits(self, x: Float[Array, "T E"]) -> Float32[Array, "*S T X"]:
        """Those of few tokens in parts, which the kernel of the choice adds up."""
        weight = self.weight[...]
        few = self.backend != "xla" and x.shape[0] <= FEW_TOKENS and x.dtype == weight.dtype == jnp.bfloat16
        tiling = _tiling(*weight.shape) if few else None
        if tiling is None:
            return dense_product(x.astype(weight.dtype), weight, out_dtype=jnp.float32)
        return skinny_gemm(x, weight, tiling, out_dtype=jnp.float32, backend=self.backend)


def _tiling(experts: int, hidden: int) -> Tiling | None:
    """So many parts that there are programs for many cores; None: there are no whole blocks."""
    block_in = next((size for size in (128, 64) if hidden % size == 0), None)
    if block_in is None:
        return None
    blocks = hidden // block_in
    splits = max(number for number in range(1, MOST_PARTS + 1) if blocks % number == 0)
    return Tiling(32 if experts <= 64 else 64, block_in, splits, num_warps=4, num_stages=3)


def choose(
    config: RouterConfig,
    logits: Float32[Array, "*S T X"],
    correction: Float32[Array, "X"] | None,
    backend: str = "xla",
    *,
    bias: Float32[Array, "X"] | None = None,
) -> Routes:
    """The routes of tokens with such logits, to which `bias` is added; among equals the expert of the lowest
    number goes first.
    """
    if config.scores == "sparsemixer":
        logits = logits.sum(0) if logits.ndim == 3 else logits
        return _sparsemixer(logits if bias is None else logits + bias, config.jitter)
    return Routes(*topk_routing(logits, correction, options_of(config), bias=bias, backend=backend))


def options_of(config: RouterConfig) -> TopK:
    """What its kernels are told."""
    assert config.scores != "sparsemixer"
    groups = config.groups, config.top_groups, config.group_score
    return TopK(config.per_token, config.scores, config.normalise, config.scale, *groups)


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
