"""Token embedding and the output head."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float, Float32, Int32

from lmdeploy_jax.models.kernels import Kernels
from lmdeploy_jax.models.linear import Linear
from lmdeploy_jax.models.products import plan
from lmdeploy_jax.models.residual import PartialSum
from lmdeploy_jax.pallas_kernels.all_reduce_norm import why_not as why_not_peers


class Embedding(Linear):
    """A [V, E] table, its rows dealt out over `tp` and padded with zeros to divide evenly."""

    def __init__(
        self, vocab_size: int, hidden_size: int, *, bias: bool = False, dtype: jnp.dtype, kernels: Kernels
    ) -> None:
        rows = -(-vocab_size // kernels.tp) * kernels.tp
        super().__init__((rows,), (hidden_size,), ("vocab", "embed"), bias=bias, dtype=dtype)
        self.kernels = kernels

    peers: nnx.Variable | None = None
    """See `projections.share_peers`."""

    def shares(self, tokens: Int32[Array, "T"]) -> PartialSum | None:
        """The tokens' rows that are on this device, if peers can add up so many."""
        dtype, size = self.weight.dense().dtype, self.weight.shape[1]
        if self.peers is None or why_not_peers(len(tokens), size, dtype) is not None:
            return None
        rows = self.kernels.collectives.own_rows(self.weight.dense(), tokens)
        return PartialSum(rows, self.peers[...])

    def lookup(self, tokens: Int32[Array, "T"]) -> Float[Array, "T E"]:
        """The tokens' rows, from whichever device holds them."""
        return self.kernels.collectives.take_rows(self.weight.dense(), tokens)

    def attend(self, hidden: Float[Array, "R E"]) -> Float32[Array, "R rows"]:
        """The table as an output head: the product with this device's rows, padding included."""
        product = plan(self.kernels, "whole", self, hidden)(self, hidden)
        return product if self.bias is None else product + self.bias[...]
