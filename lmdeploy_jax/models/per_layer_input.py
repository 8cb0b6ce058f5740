"""Inputs of each layer's own beside the residual stream (Gemma 4): of each token, looked up and computed
before the first layer, and added behind each layer's MLP.
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float, Int32

from lmdeploy_jax.models.config import DecoderConfig, PerLayerInputConfig
from lmdeploy_jax.models.embedding import Embedding
from lmdeploy_jax.models.kernels import Kernels
from lmdeploy_jax.models.linear import Linear
from lmdeploy_jax.models.norm import RMSNorm
from lmdeploy_jax.models.products import ACTIVATIONS, dense_product


class PerLayerInputs(nnx.Module):
    """A token's inputs of all L layers: half of its id's row in a table, half of its embedding."""

    def __init__(
        self, model: DecoderConfig, config: PerLayerInputConfig, *, dtype: jnp.dtype, kernels: Kernels
    ) -> None:
        self.width, self.layers = config.width, len(model.layers)
        packed = self.layers * config.width
        self.embedding = Embedding(config.vocab_size, packed, dtype=dtype, kernels=kernels)
        self.projection = Linear((packed,), (model.hidden_size,), (None, "embed"), bias=False, dtype=dtype)
        self.norm = RMSNorm(config.width, model.norm_eps, 0.0, dtype=dtype)

    def __call__(self, tokens: Int32[Array, "T"], x: Float[Array, "T E"]) -> Float[Array, "T L P"]:
        """Of token ids and their embeddings as they enter the first layer."""
        shape = (len(tokens), self.layers, self.width)
        table = self.embedding.lookup(tokens) * jnp.asarray(self.width**0.5, x.dtype)
        projected = dense_product(x, self.projection.weight.dense()) * jnp.asarray(
            x.shape[1] ** -0.5, x.dtype
        )
        both = self.norm(projected.reshape(shape)) + table.reshape(shape)
        return both * jnp.asarray(2**-0.5, x.dtype)


class PerLayerInput(nnx.Module):
    """`x + norm(projection(activation(gate(x)) * given))`, so small that every device has all of it."""

    def __init__(self, model: DecoderConfig, config: PerLayerInputConfig, *, dtype: jnp.dtype) -> None:
        self.activation = ACTIVATIONS[config.activation]
        hidden, width = model.hidden_size, config.width
        self.gate = Linear((width,), (hidden,), (None, "embed"), bias=False, dtype=dtype)
        self.projection = Linear((hidden,), (width,), ("embed", None), bias=False, dtype=dtype)
        self.norm = RMSNorm(hidden, model.norm_eps, model.norm_offset, dtype=dtype, axis="embed")

    def __call__(self, x: Float[Array, "T E"], given: Float[Array, "T P"]) -> Float[Array, "T E"]:
        inner = self.activation(dense_product(x, self.gate.weight.dense())) * given
        return x + self.norm(dense_product(inner, self.projection.weight.dense()))
