"""Token embedding and the output head."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from lmdeploy_jax.models.kernels import Kernels
from lmdeploy_jax.models.linear import Linear
from lmdeploy_jax.models.products import plan


class Embedding(Linear):
    """A [V, E] table, its rows dealt out over `tp` and padded with zeros to divide evenly."""

    def __init__(self, vocab_size: int, hidden_size: int, *, dtype: jnp.dtype, kernels: Kernels) -> None:
        rows = -(-vocab_size // kernels.tp) * kernels.tp
        super().__init__((rows,), (hidden_size,), ("vocab", "embed"), bias=False, dtype=dtype)
        self.kernels = kernels

    def lookup(self, tokens: Array) -> Array:
        """tokens i32 [T] -> [T, E]."""
        return self.kernels.collectives.take_rows(self.weight.dense(), tokens)

    def attend(self, hidden: Array) -> Array:
        """hidden [R, E] -> f32 [R, V], padding included, this device's rows: the table as an output head."""
        return plan(self.kernels, "whole", self, hidden)(self, hidden)
