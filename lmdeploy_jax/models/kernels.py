"""How a decoder calls the paged-attention kernels: which implementation, and over which devices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
from jax import Array
from jax.sharding import Mesh, PartitionSpec

from lmdeploy_jax.models.batch import Batch
from lmdeploy_jax.parallel.mesh import axis_size
from pallas_kernels.kv_write import kv_write
from pallas_kernels.paged_attention import paged_attention
from pallas_kernels.prefill_attention import prefill_attention

Cache = tuple[Array, Array]
SECOND = PartitionSpec(None, "tp")  # KV heads of activations and caches
WHOLE = PartitionSpec()


@dataclass(frozen=True)
class AttentionKind:
    """A layer's static attention options; see `pallas_kernels`."""

    scale: float
    window: int | None
    soft_cap: float | None


@dataclass(frozen=True)
class Kernels:
    """The kernel backend, and the mesh over whose `tp` axis KV heads are dealt out (None: one device)."""

    backend: str = "xla"
    mesh: Mesh | None = None

    @property
    def tp(self) -> int:
        return axis_size(self.mesh, "tp")

    def attend(
        self, q: Array, k: Array, v: Array, cache: Cache, batch: Batch, kind: AttentionKind
    ) -> tuple[Array, Cache]:
        """Writes k, v [T, KH, D] to the cache, then attends with q [T, KH, G, D] -> [T, KH, G, D], cache."""

        def local(q: Array, k: Array, v: Array, cache: Cache, batch: Batch) -> tuple[Array, Cache]:
            return self._attend_local(q, k, v, cache, batch, kind)

        if self.tp == 1:
            return local(q, k, v, cache, batch)
        in_specs = (SECOND, SECOND, SECOND, SECOND, WHOLE)
        return self._over_heads(local, in_specs)(q, k, v, cache, batch)

    def _over_heads(self, function: Callable, in_specs: tuple[PartitionSpec, ...]) -> Callable:
        return jax.shard_map(
            function, mesh=self.mesh, in_specs=in_specs, out_specs=(SECOND, SECOND), check_vma=False
        )

    def _attend_local(
        self, q: Array, k: Array, v: Array, cache: Cache, batch: Batch, kind: AttentionKind
    ) -> tuple[Array, Cache]:
        tokens, kv_heads, groups, head_dim = q.shape
        k_pages, v_pages = kv_write(*cache, k, v, batch.slots, backend=self.backend)
        flat = q.reshape(tokens, kv_heads * groups, head_dim)
        if batch.tiles is None:
            attend = partial(paged_attention, flat, k_pages, v_pages, batch.page_table, batch.kv_lens)
        else:
            attend = partial(prefill_attention, flat, k_pages, v_pages, batch.page_table, batch.tiles)
        out = attend(scale=kind.scale, window=kind.window, soft_cap=kind.soft_cap, backend=self.backend)
        return out.reshape(q.shape), (k_pages, v_pages)
