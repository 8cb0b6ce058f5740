"""Token embedding and the output head."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Float32, Int32

from lmdeploy_jax.models.kernels import Kernels
from lmdeploy_jax.models.linear import Linear
from lmdeploy_jax.models.products import plan
from lmdeploy_jax.models.residual import PartialSum, SumOverDevices


class Embedding(Linear, SumOverDevices):
    """A [V, E] table, its rows dealt out over `tp` and padded with zeros to divide evenly."""

    def __init__(
        self, vocab_size: int, hidden_size: int, *, bias: bool = False, dtype: jnp.dtype, kernels: Kernels
    ) -> None:
        rows = -(-vocab_size // kernels.tp) * kernels.tp
        super().__init__((rows,), (hidden_size,), ("vocab", "embed"), bias=bias, dtype=dtype)
        self.kernels = kernels

    def shares(self, tokens: Int32[Array, "T"]) -> PartialSum | None:
        """The tokens' rows that are on this device, if they can be added up later."""
        if self.peers is None:
            return None
        table = self.weight.dense()
        return self.left_to_norm(self.kernels.collectives.own_rows(table, tokens), table.dtype)

    def lookup(self, tokens: Int32[Array, "T"]) -> Float[Array, "T E"]:
        """The tokens' rows, from whichever device holds them."""
        return self.kernels.collectives.take_rows(self.weight.dense(), tokens)

    def attend(self, hidden: Float[Array, "R E"]) -> Float32[Array, "R rows"]:
        """The table as an output head: the product with this device's rows, padding included."""
        product = plan(self.kernels, "whole", self, hidden)(self, hidden)
        return product if self.bias is None else product + self.bias[...]
