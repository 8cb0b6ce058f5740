"""How a decoder calls the kernels: which implementation, and over which devices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, PartitionSpec
from jax.typing import DTypeLike

from lmdeploy_jax.models.batch import AttentionMetadata
from lmdeploy_jax.models.linear import Linear, product
from lmdeploy_jax.models.norm import RMSNorm
from lmdeploy_jax.models.tuning import UNTUNED, Tuning
from lmdeploy_jax.pallas_kernels.norm import add_rms_norm
from lmdeploy_jax.pallas_kernels.options import AttentionOptions
from lmdeploy_jax.pallas_kernels.paged_attention import paged_attention
from lmdeploy_jax.pallas_kernels.prefill_attention import prefill_attention, why_not_mosaic
from lmdeploy_jax.pallas_kernels.rope_kv_write import HeadWork, rope_kv_write
from lmdeploy_jax.pallas_kernels.skinny_gemm import (
    StreamTiling,
    Tiling,
    gated_skinny_gemm,
    norm_skinny_gemm,
    skinny_gemm,
)
from lmdeploy_jax.parallel.mesh import axis_size

LayerCache = tuple[Array, ...]  # with the counters of decode attention, which all layers share
MOSAIC_TOKENS = 2048  # of the smallest step that attends through Mosaic
Activation = Callable[[Array], Array]
SECOND = PartitionSpec(None, "tp")  # KV heads of activations and caches
WHOLE = PartitionSpec()
HEADS = HeadWork(PartitionSpec("tp"), WHOLE, WHOLE, WHOLE, WHOLE)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Kernels:
    """The kernel backend, the mesh over whose `tp` axis KV heads are dealt out (None: one device), and what
    was measured on the device.
    """

    backend: str = "xla"
    mesh: Mesh | None = None
    tuning: Tuning = UNTUNED

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

        Few tokens fill few cores unless the weight is cut along its inner axis too. XLA would sum the parts
        in a kernel of their own.
        """
        weight, inner = linear.weight[...], x[0].size
        flat = weight.reshape(-1, inner)
        tiling = self._tiling("parts", flat.shape, x)
        if not isinstance(tiling, Tiling):
            return product(x, weight)
        parts = skinny_gemm(x.reshape(-1, inner), flat, tiling, out_dtype=jnp.float32, backend=self.backend)
        return parts.reshape(*parts.shape[:2], *weight.shape[: weight.ndim - x.ndim + 1])

    def gated_product(self, linear: Linear, x: Array, activation: Activation) -> Array | None:
        """`activation(gate) * up` of `linear` [2, I, E], x [T, E] -> [T, I]; None where XLA does better."""
        weight = linear.weight[...]
        tiling = self._tiling("gated", weight.shape[1:], x)
        odd = isinstance(tiling, StreamTiling) and x.shape[0] % 8 != 0
        if tiling is None or odd or linear.bias is not None:
            return None
        return gated_skinny_gemm(x, weight, tiling, activation=activation, backend=self.backend)

    def norm_product(
        self, linear: Linear, x: Array, delta: Array | None, norm: RMSNorm | None
    ) -> tuple[Array, Array]:
        """`add_norm` and `product` -> x, and the product of the normed x."""
        done = self._norm_product("norm_parts", linear, x, delta, norm, None)
        if done is None:
            x, normed = self.add_norm(x, delta, norm)
            return x, self.product(linear, normed)
        x, flat = done
        return x, flat.reshape(1, 1, *linear.weight.shape[:-1])

    def norm_gated_product(
        self, linear: Linear, x: Array, delta: Array | None, norm: RMSNorm | None, activation: Activation
    ) -> tuple[Array, Array] | None:
        """`add_norm` and `gated_product` -> x, and the product; None where they are better separate."""
        if linear.bias is not None:
            return None
        return self._norm_product("norm_gated", linear, x, delta, norm, activation)

    def _norm_product(
        self,
        kind: str,
        linear: Linear,
        x: Array,
        delta: Array | None,
        norm: RMSNorm | None,
        activation: Activation | None,
    ) -> tuple[Array, Array] | None:
        weight = linear.weight[...]
        flat = weight.reshape(-1, x.shape[1]) if activation is None else weight
        tiling = self._tiling(kind, flat.shape[-2:], x) if x.dtype == jnp.bfloat16 else None
        if not isinstance(tiling, Tiling) or x.shape[0] != 1 or delta is None or norm is None:
            return None
        return norm_skinny_gemm(
            x,
            delta,
            norm.weight[...],
            flat,
            tiling,
            activation=activation,
            eps=norm.eps,
            offset=norm.offset,
            out_dtype=jnp.float32 if activation is None else x.dtype,
            backend=self.backend,
        )

    def whole_product(self, x: Array, weight: Array) -> Array:
        """x [T, K] @ weight [N, K]^T -> f32 [T, N]."""
        tiling = self._tiling("whole", weight.shape, x)
        if not isinstance(tiling, Tiling):
            return product(x, weight, out_dtype=jnp.float32)
        return skinny_gemm(x, weight, tiling, out_dtype=jnp.float32, backend=self.backend)[0]

    def _tiling(self, kind: str, weight: tuple[int, ...], x: Array) -> Tiling | StreamTiling | None:
        tunable = self.tp == 1 and x.dtype.itemsize == 2  # as they were measured
        return self.tuning.find(kind, weight, x.shape[0]) if tunable else None

    def attend(
        self,
        qkv: Array,
        work: HeadWork,
        cache: LayerCache,
        metadata: AttentionMetadata,
        options: AttentionOptions,
        *,
        eps: float,
        offset: float,
        dtype: DTypeLike,
    ) -> tuple[Array, LayerCache]:
        """qkv [(S,) T, KH, G + 2, D] into the cache and through attention -> [T, KH, G, D] of `dtype`, cache.

        eps and offset are those of the norms of q and k.
        """
        head_work = {"eps": eps, "offset": offset, "dtype": dtype, "backend": self.backend}

        def local(
            qkv: Array, work: HeadWork, cache: LayerCache, metadata: AttentionMetadata
        ) -> tuple[Array, LayerCache]:
            return self._attend_local(qkv, work, cache, metadata, options, head_work)

        if self.tp == 1:
            return local(qkv, work, cache, metadata)
        in_specs = (SECOND, HEADS, SECOND, WHOLE)
        return jax.shard_map(
            local, mesh=self.mesh, in_specs=in_specs, out_specs=(SECOND, SECOND), check_vma=False
        )(qkv, work, cache, metadata)

    def _attend_local(
        self,
        qkv: Array,
        work: HeadWork,
        cache: LayerCache,
        metadata: AttentionMetadata,
        options: AttentionOptions,
        head_work: dict[str, Any],
    ) -> tuple[Array, LayerCache]:
        k_pages, v_pages, arrivals = cache
        if metadata.tiles is None:
            rows = (metadata.slots, metadata.page_table, metadata.kv_lens, arrivals)
            args = (qkv, k_pages, v_pages, *rows, work)
            out, k_pages, v_pages, arrivals = paged_attention(*args, options=options, **head_work)
            return out, (k_pages, v_pages, arrivals)
        q, k_pages, v_pages = rope_kv_write(qkv, k_pages, v_pages, metadata.slots, work, **head_work)
        arguments = (
            q.reshape(q.shape[0], -1, q.shape[-1]),
            k_pages,
            v_pages,
            metadata.page_table,
            metadata.tiles,
        )
        backend = self._prefill_backend(q, k_pages, options)
        out = prefill_attention(*arguments, options=options, backend=backend)
        return out.reshape(q.shape), (k_pages, v_pages, arrivals)

    def _prefill_backend(self, q: Array, k_pages: Array, options: AttentionOptions) -> str:
        """Mosaic's calls take the host longer than a short step lasts: they are for long ones."""
        wanted = self.tuning.prefill_attention == "mosaic" and q.shape[0] >= MOSAIC_TOKENS
        if self.backend != "pallas" or not wanted:
            return self.backend
        plain = options.window is None and options.soft_cap is None
        return "mosaic" if plain and why_not_mosaic(q.dtype, k_pages.dtype, q.shape[-1]) is None else "pallas"
