"""The decoder over several devices: one `shard_map` around it, inside which modules see local shapes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Float, Float32

from lmdeploy_jax.cache.kv import KVCache, cache_spec
from lmdeploy_jax.models.batch import Batch
from lmdeploy_jax.models.config import DecoderConfig
from lmdeploy_jax.models.decoder import Decoder, finish_logits
from lmdeploy_jax.parallel.mesh import model_axes

REPLICATED = PartitionSpec()
Leaves = tuple[Array, ...]


@dataclass(frozen=True)
class ShardedDecoder:
    """A `Decoder` whose weights and cache lie on several devices; called as a `Decoder` is."""

    merge: Callable[[Leaves], Decoder]
    """A decoder of one device's leaves."""
    leaves: Leaves
    specs: tuple[PartitionSpec, ...]
    """How each of `leaves` is cut."""
    mesh: Mesh
    config: DecoderConfig
    dtype: jnp.dtype

    def __call__(self, cache: KVCache, batch: Batch) -> tuple[Float[Array, "T E"], KVCache]:
        """See `Decoder.__call__`. Every device gets the whole batch, and has all of the hidden states."""
        cuts = _cache_specs(cache, self.mesh)

        def forward(leaves: Leaves, cache: KVCache, batch: Batch) -> tuple[Array, KVCache]:
            return self.merge(leaves)(cache, batch)

        return self._map(forward, (cuts, REPLICATED), (REPLICATED, cuts))(self.leaves, cache, batch)

    def logits(self, hidden: Float[Array, "R E"]) -> Float32[Array, "R V"]:
        """See `Decoder.logits`. They stay cut by vocabulary: XLA finds the best token of each part, and lets
        only those travel.
        """

        def head(leaves: Leaves, hidden: Array) -> Array:
            return self.merge(leaves).head_product(hidden)

        by_vocabulary = PartitionSpec(None, model_axes(self.mesh))
        product = self._map(head, (REPLICATED,), by_vocabulary)(self.leaves, hidden)
        return finish_logits(self.config, product)

    def scores(self, hidden: Float[Array, "R E"]) -> Float32[Array, "R labels"]:
        """See `Decoder.scores`. Its weights are whole on every device."""
        return self.merge(self.leaves).scores(hidden)

    def _map(self, function: Callable[..., Any], inputs: tuple[Any, ...], outputs: Any) -> Callable[..., Any]:
        specs = (self.specs, *inputs)
        return jax.shard_map(function, mesh=self.mesh, in_specs=specs, out_specs=outputs, check_vma=False)


AnyDecoder = Decoder | ShardedDecoder


def _cache_specs(cache: KVCache, mesh: Mesh) -> KVCache:
    kinds = zip(cache.layout.arrays, cache.arrays, strict=True)
    specs: Any = tuple((cache_spec(kind, mesh),) * len(arrays) for kind, arrays in kinds)
    return KVCache(specs, cache.layout)
