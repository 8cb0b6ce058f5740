"""The head of models that judge a text: a product or two in the place of the output head."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float, Float32

from lmdeploy_jax.models.linear import Linear
from lmdeploy_jax.models.score_config import ScoreConfig


class ScoreHead(nnx.Module):
    """Every device holds all of it: it is small, and few rows are judged."""

    def __init__(self, hidden_size: int, config: ScoreConfig, *, dtype: jnp.dtype) -> None:
        inner, labels = config.width or hidden_size, (len(config.labels),)
        axes = (None, "embed")
        self.inner = config.width and Linear((inner,), (hidden_size,), axes, bias=True, dtype=dtype)
        self.out = Linear(labels, (inner,), axes, bias=config.bias, dtype=dtype)

    def __call__(self, hidden: Float[Array, "R E"]) -> Float32[Array, "R labels"]:
        if self.inner:
            hidden = jax.nn.relu(_product(self.inner, hidden)).astype(hidden.dtype)
        return _product(self.out, hidden)


def _product(linear: Linear, x: Float[Array, "R inner"]) -> Float32[Array, "R out"]:
    product = jnp.einsum("ri,oi->ro", x, linear.weight.dense(), preferred_element_type=jnp.float32)
    return product if linear.bias is None else product + linear.bias[...]
