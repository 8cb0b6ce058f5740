"""The decoder over several devices: one `shard_map` around it, inside which modules see local shapes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Float, Float32, Int32

from lmdeploy_jax.cache.kv import KVCache, cache_spec
from lmdeploy_jax.models.batch import Batch
from lmdeploy_jax.models.config import DecoderConfig
from lmdeploy_jax.models.decoder import Decoder, finish_logits
from lmdeploy_jax.models.residual import share_peers
from lmdeploy_jax.pallas_kernels.all_gather import all_gather
from lmdeploy_jax.pallas_kernels.all_reduce_norm import why_not as why_not_peers
from lmdeploy_jax.pallas_kernels.workspace import Workspace
from lmdeploy_jax.parallel.mesh import model_axes
from lmdeploy_jax.sampling.sampler import best_of_parts, best_token, greedy

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
    backend: str
    peers: Array | None = None
    """See `lmdeploy_jax.parallel.peers`."""

    def __call__(self, cache: KVCache, batch: Batch) -> tuple[Float[Array, "T E"], KVCache]:
        """See `Decoder.__call__`. Every device gets the whole batch, and has all of the hidden states."""
        cuts = _cache_specs(cache, self.mesh)

        def forward(
            leaves: Leaves, cache: KVCache, batch: Batch, peers: Array | None
        ) -> tuple[Array, KVCache]:
            decoder = self.merge(leaves)
            if peers is not None:
                share_peers(decoder, peers)
            return decoder(cache, batch)

        inputs = (cuts, REPLICATED, PartitionSpec(model_axes(self.mesh)))
        mapped = self._map(forward, inputs, (REPLICATED, cuts))
        return mapped(self.leaves, cache, batch, self.peers)

    def logits(self, hidden: Float[Array, "R E"]) -> Float32[Array, "R V"]:
        """See `Decoder.logits`. They stay cut by vocabulary: XLA finds the best token of each part, and lets
        only those travel.
        """

        def head(leaves: Leaves, hidden: Array) -> Array:
            return self.merge(leaves).head_product(hidden)

        by_vocabulary = PartitionSpec(None, model_axes(self.mesh))
        product = self._map(head, (REPLICATED,), by_vocabulary)(self.leaves, hidden)
        return finish_logits(self.config, product)

    def greedy(self, hidden: Float[Array, "R E"]) -> Int32[Array, "R"]:
        """See `Decoder.greedy`. Peers tell each other the best token of each part."""
        size = self.config.hidden_size
        if self.peers is None or why_not_peers(len(hidden), size, hidden.dtype) is not None:
            return greedy(self.logits(hidden))

        def best(leaves: Leaves, hidden: Array, peers: Array) -> Array:
            product = self.merge(leaves).head_product(hidden)
            first = peers[0, 0] * product.shape[1]
            beyond = first + jnp.arange(product.shape[1]) >= self.config.vocab_size
            token, score = best_token(jnp.where(beyond, -jnp.inf, finish_logits(self.config, product)))
            words = [jnp.where(token < 0, token, first + token), lax.bitcast_convert_type(score, jnp.int32)]
            workspace = Workspace.of(peers.shape[1], size, hidden.dtype)
            how: dict[str, Any] = {"axis": model_axes(self.mesh), "backend": self.backend}
            found = all_gather(jnp.stack(words, axis=1), peers, workspace, **how)
            return best_of_parts(found[:, :, 0], lax.bitcast_convert_type(found[:, :, 1], jnp.float32))

        inputs = (REPLICATED, PartitionSpec(model_axes(self.mesh)))
        return self._map(best, inputs, REPLICATED)(self.leaves, hidden, self.peers)

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
