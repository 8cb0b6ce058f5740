"""How a decoder calls the kernels: which implementation, and over which devices."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
from jax import Array
from jax.sharding import Mesh, PartitionSpec
from jax.typing import DTypeLike

from lmdeploy_jax.models.batch import Batch
from lmdeploy_jax.models.linear import Linear, product, product_in_parts
from lmdeploy_jax.models.norm import RMSNorm
from lmdeploy_jax.parallel.mesh import axis_size
from pallas_kernels.norm import add_rms_norm
from pallas_kernels.paged_attention import paged_attention
from pallas_kernels.prefill_attention import prefill_attention
from pallas_kernels.rope_kv_write import HeadWork, rope_kv_write

Cache = tuple[Array, Array]
SECOND = PartitionSpec(None, "tp")  # KV heads of activations and caches
WHOLE = PartitionSpec()
HEADS = HeadWork(PartitionSpec("tp"), WHOLE, WHOLE, WHOLE, WHOLE)  # type: ignore[arg-type]

CORES = 132  # of an H200; on other GPUs close enough
PART_TILE = (64, 128)  # tokens and outputs that one core multiplies at a time
PART_DEPTH = 128  # least inner elements of a part


@dataclass(frozen=True)
class AttentionKind:
    """A layer's static attention options; see `pallas_kernels`. The last two are those of q and k norms."""

    scale: float
    window: int | None
    soft_cap: float | None
    norm_eps: float
    norm_offset: float


@dataclass(frozen=True)
class Kernels:
    """The kernel backend, and the mesh over whose `tp` axis KV heads are dealt out (None: one device)."""

    backend: str = "xla"
    mesh: Mesh | None = None

    @property
    def tp(self) -> int:
        return axis_size(self.mesh, "tp")

    def add_norm(self, x: Array, delta: Array | None, norm: RMSNorm | None) -> tuple[Array, Array]:
        """The residual stream x [T, E] with what is added to it, whole or in parts -> x, and x normalised."""
        if delta is None:
            return x, x if norm is None else norm(x)
        if norm is None:
            x = x + delta
            return x, x
        add = partial(add_rms_norm, eps=norm.eps, offset=norm.offset, backend=self.backend)
        if self.tp > 1 and self.backend != "xla":
            specs = (WHOLE, WHOLE, WHOLE)
            add = jax.shard_map(
                add, mesh=self.mesh, in_specs=specs, out_specs=(WHOLE, WHOLE), check_vma=False
            )
        return add(x, delta, norm.weight[...])

    def product(self, linear: Linear, x: Array) -> Array:
        """`linear` without its bias, for a kernel that adds up parts: [T, *out] or f32 [S, T, *out].

        Few tokens fill few cores unless the weight is cut along its inner axis too. XLA would do that by
        itself, and sum the parts in a kernel of their own.
        """
        weight = linear.weight[...]
        parts = self._parts(x.shape[0], weight.size // x[0].size, x[0].size)
        return product(x, weight) if parts == 1 else product_in_parts(x, weight, parts)

    def _parts(self, tokens: int, out: int, inner: int) -> int:
        if self.backend == "xla" or self.tp > 1:
            return 1
        tiles = -(-tokens // PART_TILE[0]) * -(-out // PART_TILE[1])
        parts = 1
        while parts * tiles < CORES and inner % (2 * parts * PART_DEPTH) == 0:
            parts *= 2
        return parts

    def attend(
        self, qkv: Array, work: HeadWork, cache: Cache, batch: Batch, kind: AttentionKind, dtype: DTypeLike
    ) -> tuple[Array, Cache]:
        """qkv [(S,) T, KH, G + 2, D] through `rope_kv_write` and attention -> [T, KH, G, D], cache."""

        def local(qkv: Array, work: HeadWork, cache: Cache, batch: Batch) -> tuple[Array, Cache]:
            return self._attend_local(qkv, work, cache, batch, kind, dtype)

        if self.tp == 1:
            return local(qkv, work, cache, batch)
        in_specs = (SECOND, HEADS, SECOND, WHOLE)
        return jax.shard_map(
            local, mesh=self.mesh, in_specs=in_specs, out_specs=(SECOND, SECOND), check_vma=False
        )(qkv, work, cache, batch)

    def _attend_local(
        self, qkv: Array, work: HeadWork, cache: Cache, batch: Batch, kind: AttentionKind, dtype: DTypeLike
    ) -> tuple[Array, Cache]:
        prepare = partial(rope_kv_write, eps=kind.norm_eps, offset=kind.norm_offset, dtype=dtype)
        q, k_pages, v_pages = prepare(qkv, *cache, batch.slots, work, backend=self.backend)
        flat = q.reshape(q.shape[0], -1, q.shape[-1])
        if batch.tiles is None:
            attend = partial(paged_attention, flat, k_pages, v_pages, batch.page_table, batch.kv_lens)
        else:
            attend = partial(prefill_attention, flat, k_pages, v_pages, batch.page_table, batch.tiles)
        out = attend(scale=kind.scale, window=kind.window, soft_cap=kind.soft_cap, backend=self.backend)
        return out.reshape(q.shape), (k_pages, v_pages)
