"""How a decoder calls the kernels: which implementation, over which devices, and as measured on them.

Arrays here are what one device sees: the decoder runs inside one `shard_map` (`models.sharded`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import jax
from jax import Array
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Float, Float32

from lmdeploy_jax.models.batch import AttentionMetadata
from lmdeploy_jax.models.config import AttentionConfig, LatentConfig, MixerConfig
from lmdeploy_jax.models.norm import Norm, RMSNorm
from lmdeploy_jax.models.residual import Delta, PartialSum
from lmdeploy_jax.models.tuning import UNTUNED, Tuning
from lmdeploy_jax.pallas_kernels.all_reduce_norm import all_reduce_add_rms_norm
from lmdeploy_jax.pallas_kernels.latent_attention import (
    latent_attention,
    latent_queries,
    values_of_latents,
)
from lmdeploy_jax.pallas_kernels.norm import add_rms_norm, add_rms_norm_quant
from lmdeploy_jax.pallas_kernels.options import PAGE_SIZE
from lmdeploy_jax.pallas_kernels.paged_attention import paged_attention
from lmdeploy_jax.pallas_kernels.prefill_attention import (
    prefill_attention,
    scratch_pages,
    tile_rows,
    why_not_mosaic,
)
from lmdeploy_jax.pallas_kernels.quant_pages import as_pages
from lmdeploy_jax.pallas_kernels.rope_kv_write import HeadWork, rope_kv_write
from lmdeploy_jax.pallas_kernels.round_rows import round_rows
from lmdeploy_jax.pallas_kernels.shapes import Pages, Quantised
from lmdeploy_jax.parallel.collectives import Collectives, collectives
from lmdeploy_jax.parallel.mesh import axis_size, model_axes, model_devices

LayerCache = tuple[
    Array, ...
]  # and the split counters of decode attention, which layers of as many heads share
MOSAIC_TOKENS = 2048  # of the smallest step that attends through Mosaic


@dataclass(frozen=True)
class Kernels:
    """The kernel backend, the mesh whose devices share the decoder (None: JAX's first device), and what was
    measured on the device.

    without_triton: whether XLA is told to leave its Triton kernels out, see `engine.core.compile`: then it
    would write one row's head out in f32 before the product.
    """

    backend: str = "xla"
    mesh: Mesh | None = None
    tuning: Tuning = UNTUNED
    without_triton: bool = False

    @property
    def tp(self) -> int:
        """Devices that share the decoder."""
        return model_devices(self.mesh)

    @property
    def ep(self) -> int:
        """Parts that experts are dealt out in."""
        return axis_size(self.mesh, "ep")

    @property
    def platform(self) -> str:
        """As `jax.Device.platform` has it."""
        devices = jax.devices() if self.mesh is None else self.mesh.devices.flat
        return devices[0].platform

    @property
    def rounding_backend(self) -> str:
        """What rounds activations to 8 bits for XLA's products: `backend` where it measured faster."""
        return self.backend if self.tuning.rounding == "pallas" else "xla"

    @property
    def rounds_gated(self) -> bool:
        """Whether one kernel gates and rounds, where no kernel of a product has gated: it measured faster."""
        return self.backend != "xla" and self.tuning.activation == "pallas"

    def mixer_backend(self, mixer: MixerConfig) -> str:
        """`backend`, or XLA for heads that its kernels cannot do."""
        return "xla" if mixer.why_not_kernels() else self.backend

    @property
    def has_peers(self) -> bool:
        """Whether devices store their shares of small sums for each other, as measured to be faster."""
        return self.tp > 1 and self.backend != "xla" and self.tuning.all_reduce == "pallas"

    @property
    def collectives(self) -> Collectives:
        """What goes between the devices."""
        return collectives(self.mesh)

    def add_norm(
        self, x: Float[Array, "T E"], delta: Delta | None, norm: Norm | None
    ) -> tuple[Float[Array, "T E"], Float[Array, "T E"]]:
        """The residual stream x with what is added to it -> x, and x normalised."""
        if delta is None:
            return x, x if norm is None else norm(x)
        if isinstance(delta, PartialSum):
            return self._all_reduce_norm(x, delta, norm)
        if not isinstance(norm, RMSNorm):
            x = x + (delta.sum(0).astype(x.dtype) if delta.ndim == 3 else delta)
            return x, x if norm is None else norm(x)
        weight, options = norm.weight[...], {"eps": norm.eps, "offset": norm.offset}
        return add_rms_norm(x, delta, weight, **options, backend=self.backend)

    def _all_reduce_norm(
        self, x: Float[Array, "T E"], delta: PartialSum, norm: Norm | None
    ) -> tuple[Float[Array, "T E"], Float[Array, "T E"]]:
        if not isinstance(norm, RMSNorm):
            return self.add_norm(x, self.collectives.all_reduce(delta.parts, x.dtype), norm)
        how: dict[str, Any] = {"eps": norm.eps, "offset": norm.offset, "backend": self.backend}
        return all_reduce_add_rms_norm(
            x, delta.parts, norm.weight[...], delta.peers, axis=model_axes(self.mesh), **how
        )

    def add_norm_quant(
        self,
        x: Float[Array, "T E"],
        delta: Delta,
        norm: RMSNorm,
        dtype: str,
        **rounding: Any,
    ) -> tuple[Float[Array, "T E"], Quantised]:
        """The same, with what is normalised rounded to 8 bits, in `groups`, perhaps by one `scale`."""
        if isinstance(delta, PartialSum):
            x, normed = self.add_norm(x, delta, norm)
            return x, round_rows(normed, dtype, **rounding, backend=self.backend)
        how: dict[str, Any] = {"eps": norm.eps, "offset": norm.offset, "backend": self.backend}
        return add_rms_norm_quant(x, delta, norm.weight[...], dtype, **rounding, **how)

    def attend(
        self,
        qkv: Float[Array, "*S T KH R D"],
        work: HeadWork,
        cache: LayerCache,
        metadata: AttentionMetadata,
        mixer: AttentionConfig,
        *,
        sinks: Float32[Array, "H"] | None = None,
        dtype: DTypeLike,
    ) -> tuple[Float[Array, "T KH R-2 D"], LayerCache]:
        """qkv (R = G + 2) into the cache and through attention -> outputs of `dtype`, and the cache."""
        options, backend = mixer.options, self.mixer_backend(mixer)
        how: dict[str, Any] = {"dtype": dtype, "backend": backend}
        k_pages, v_pages = as_pages(cache[:-1], mixer.kv_format)
        split_counters = cache[-1]
        if metadata.tiles is None:
            rows = (metadata.slots, metadata.page_table, metadata.kv_lens, split_counters)
            args = (qkv, k_pages, v_pages, *rows, work)
            out, *cached = paged_attention(*args, options=options, sinks=sinks, **how)
            return out, tuple(jax.tree.leaves(cached))
        q, k_pages, v_pages = rope_kv_write(qkv, k_pages, v_pages, metadata.slots, work, **how)
        queries = q.reshape(q.shape[0], -1, q.shape[-1])
        if backend == "pallas":
            backend = self._prefill_backend(q, k_pages, mixer, metadata)
        arguments = (queries, k_pages, v_pages, metadata.page_table, metadata.tiles)
        height = tile_rows(self.backend)  # of the batch's tiles, which layers of both backends share
        ahead = None if mixer.causal else metadata.lookahead
        how = {"sinks": sinks, "lookahead": ahead, "backend": backend, "tile_rows": height}
        out = prefill_attention(*arguments, options=options, **how)
        return out.reshape(q.shape), (*jax.tree.leaves((k_pages, v_pages)), split_counters)

    def attend_latent(
        self,
        q: Float[Array, "T H D"],
        latents: Float[Array, "T L"],
        kv_b: Float[Array, "H N R"],
        work: HeadWork,
        cache: LayerCache,
        metadata: AttentionMetadata,
        mixer: LatentConfig,
    ) -> tuple[Float[Array, "T H V"], LayerCache]:
        """The products that make queries and latents -> values of the queries' attention, and the cache with
        the latents.
        """
        (pages, *rest), backend = cache, self.mixer_backend(mixer)
        fused = metadata.tiles is None and self.tuning.latent_queries == "pallas"
        queries, latents = latent_queries(q, latents, kv_b, work, backend=backend if fused else "xla")
        where = (metadata.slots, metadata.page_table, metadata.kv_lens, metadata.tiles)
        how: dict[str, Any] = {"rank": mixer.latent_rank, "options": mixer.options, "backend": backend}
        how["tile_rows"] = tile_rows(self.backend)
        out, pages = latent_attention(queries, latents, pages, *where, **how)
        return values_of_latents(out, kv_b, mixer.value_dim), (pages, *rest)

    def scratch_elements(self, mixers: Iterable[MixerConfig], tokens: int, session_len: int) -> int:
        """Of pages of codes that a step of `tokens` tokens widens: the largest layer's, on all devices."""
        coded = (x for x in mixers if isinstance(x, AttentionConfig) and x.kv_format is not None)
        taken = {x.held_kv_heads(self.tp) * x.head_dim for x in coded if self._mosaic(x, tokens)}
        pages = scratch_pages(tokens, -(-session_len // PAGE_SIZE))
        return 2 * pages * PAGE_SIZE * max(taken, default=0)

    def _prefill_backend(
        self, q: Array, k_pages: Pages, mixer: AttentionConfig, metadata: AttentionMetadata
    ) -> str:
        causal = mixer.causal or metadata.lookahead is None
        held = q.dtype if mixer.kv_format else k_pages.dtype  # codes are widened
        fits = causal and why_not_mosaic(q.dtype, held, q.shape[-1]) is None
        return "mosaic" if fits and self._mosaic(mixer, q.shape[0]) else "pallas"

    def _mosaic(self, mixer: AttentionConfig, tokens: int) -> bool:
        """Mosaic's calls take the host longer than a short step lasts: they are for long ones."""
        long = self.tuning.prefill_attention == "mosaic" and tokens >= MOSAIC_TOKENS
        options = mixer.options
        plain = options.window is None and options.chunk is None and options.soft_cap is None
        return long and plain and not mixer.sinks
