"""Token embedding and the output head."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jax.sharding import PartitionSpec

from lmdeploy_jax.models.kernels import WHOLE, Kernels
from lmdeploy_jax.models.linear import param


class Embedding(nnx.Module):
    """A [V, E] table, its rows dealt out over `tp` and padded with zeros to divide evenly."""

    def __init__(self, vocab_size: int, hidden_size: int, *, dtype: jnp.dtype, kernels: Kernels) -> None:
        self.kernels = kernels
        rows = -(-vocab_size // kernels.tp) * kernels.tp
        self.weight = param((rows, hidden_size), dtype, ("vocab", "embed"))

    def lookup(self, tokens: Array) -> Array:
        """tokens i32 [T] -> [T, E]."""
        table = self.weight[...]
        if self.kernels.tp == 1:
            return table.at[tokens].get(mode="clip")
        return jax.shard_map(
            _lookup_shard,
            mesh=self.kernels.mesh,
            in_specs=(PartitionSpec("tp"), WHOLE),
            out_specs=WHOLE,
            check_vma=False,
        )(table, tokens)

    def attend(self, hidden: Array) -> Array:
        """hidden [R, E] -> f32 [R, V], padding included: the product with every row, as an output head."""
        return self.kernels.whole_product(hidden, self.weight[...])


def _lookup_shard(table: Array, tokens: Array) -> Array:
    """Each device looks its own rows up and gives zeros for the others: their sum is the embedding."""
    local = tokens - lax.axis_index("tp") * table.shape[0]
    mine = (local >= 0) & (local < table.shape[0])
    rows = jnp.where(mine[:, None], table.at[local].get(mode="clip"), 0)
    return lax.psum(rows, "tp")
