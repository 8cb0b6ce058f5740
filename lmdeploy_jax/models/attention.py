"""Grouped-query attention (Ainslie et al., 2023) over a paged KV cache."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from lmdeploy_jax.models import head_work
from lmdeploy_jax.models.batch import AttentionMetadata
from lmdeploy_jax.models.config import AttentionConfig, DecoderConfig
from lmdeploy_jax.models.kernels import Kernels, LayerCache
from lmdeploy_jax.models.linear import param
from lmdeploy_jax.models.norm import Norm, RMSNorm, WidthNorm
from lmdeploy_jax.models.projections import ColumnParallelLinear, RowParallelLinear
from lmdeploy_jax.models.residual import Delta, NextDelta
from lmdeploy_jax.models.rope import Rotation
from lmdeploy_jax.pallas_kernels.rope_kv_write import HeadWork

Norms = tuple[WidthNorm, WidthNorm]  # of q and of k
NOWHERE = -1  # the slot of what is not written


class Attention(nnx.Module):
    """q, k and v in one product, laid out by KV head: `[KH, G + 2, D, E]`, G query heads, then k, then v;
    with gates `[KH, 2 G + 2, D, E]`, each behind its query head. Without v where it
    is k; of a layer that reads another's keys and values, q alone.

    added_plainly: whether the layer adds the output to the residual stream as it is.
    """

    def __init__(
        self,
        model: DecoderConfig,
        config: AttentionConfig,
        *,
        added_plainly: bool,
        dtype: jnp.dtype,
        kernels: Kernels,
    ) -> None:
        kv_heads = config.held_kv_heads(kernels.tp)
        groups, head_dim = config.heads // kv_heads, config.head_dim
        self.kernels = kernels
        self.config = config
        self.norm_eps, self.norm_offset = model.norm_eps, model.norm_offset
        rows = (2 * groups if config.gated else groups) + config.own_rows
        self.qkv = ColumnParallelLinear(
            (kv_heads, rows, head_dim),
            (model.hidden_size,),
            ("kv_heads", None, None, "embed"),
            bias=config.qkv_bias,
            dtype=dtype,
            kernels=kernels,
        )
        self.replicas = kv_heads // config.kv_heads
        normed = config.qk_norm and config.qk_norm_weight
        self.q_norm = self._norm((kv_heads, groups, head_dim), dtype) if normed else None
        self.k_norm = (
            self._norm((kv_heads, head_dim), dtype) if normed and config.shared_layer is None else None
        )
        self.sinks = (
            param((kv_heads, groups), jnp.dtype("float32"), ("kv_heads", None)) if config.sinks else None
        )
        self.o = RowParallelLinear(
            (model.hidden_size,),
            (kv_heads, groups, head_dim),
            ("embed", "kv_heads", None, None),
            bias=config.o_bias,
            dtype=dtype,
            kernels=kernels,
            added_up=added_plainly,
        )

    def _norm(self, heads: tuple[int, ...], dtype: jnp.dtype) -> RMSNorm | WidthNorm:
        if self.config.qk_norm_width or self.config.qk_layer_norm:
            return WidthNorm(heads, dtype=dtype)
        return RMSNorm(heads[-1], self.norm_eps, self.norm_offset, dtype=dtype)

    def __call__(
        self,
        x: Float[Array, "T E"],
        delta: Delta | None,
        norm: Norm | None,
        cache: LayerCache,
        metadata: AttentionMetadata,
        rope: Rotation | None,
    ) -> tuple[Float[Array, "T E"], NextDelta, LayerCache]:
        """`Kernels.add_norm` of the first three, and attention -> x, what is added to it next, cache.

        `rope` is None in a layer without RoPE.
        """
        work, gates = self._work(rope, x.dtype), None
        if self.config.is_read_by_kernels:
            x, qkv, mean_squares = self.qkv.unscaled(x, delta, norm)
            work = replace(work, mean_squares=mean_squares)
        else:
            x, qkv = self.qkv(x, delta, norm)  # [(S,) T, KH, G + 2, D]
        if self.config.shared_layer is not None:
            qkv, work = head_work.queries_alone(qkv, work)
            metadata = replace(metadata, slots=jnp.full_like(metadata.slots, NOWHERE))
        if self.config.gated:
            qkv, gates, work = head_work.without_gates(qkv, work, x.dtype)
        if not self.config.is_plain:
            qkv, work = self._worked(qkv, work, rope, x.dtype)
        sinks = None if self.sinks is None else self.sinks[...].reshape(-1)
        args = (qkv, work, cache, metadata, self.config)
        out, cache = self.kernels.attend(*args, sinks=sinks, dtype=x.dtype)
        out = out if gates is None else out * jax.nn.sigmoid(gates)
        multiplier = self.config.output_multiplier
        return x, self.o(out if multiplier == 1.0 else out * multiplier), cache

    def _worked(
        self, qkv: Array, work: HeadWork, rope: Rotation | None, dtype: jnp.dtype
    ) -> tuple[Float[Array, "T KH R D"], HeadWork]:
        """See `models.head_work`."""
        qkv, work = head_work.biased(qkv, work, dtype)
        if isinstance(self.q_norm, WidthNorm) and isinstance(self.k_norm, WidthNorm):
            qkv = self._normed(qkv, (self.q_norm, self.k_norm))
        qkv = jnp.concatenate([qkv, qkv[:, :, -1:]], axis=2) if self.config.own_rows == 1 else qkv
        qkv = head_work.norm_values(qkv, self.norm_eps) if self.config.v_norm else qkv
        qkv = head_work.scale_queries(qkv, rope)
        return head_work.rotate_then_norm(qkv, work) if self.config.qk_norm_after_rope else (qkv, work)

    def _normed(self, qkv: Float[Array, "T KH R D"], norms: Norms) -> Float[Array, "T KH R D"]:
        if self.config.qk_layer_norm:
            return head_work.norm_heads(qkv, norms, self.norm_eps)
        reduce = self.kernels.collectives.all_reduce
        how: dict[str, Any] = {"eps": self.norm_eps, "replicas": self.replicas, "reduce": reduce}
        return head_work.norm_widths(qkv, norms, self.config, **how)

    def _work(self, rope: Rotation | None, dtype: DTypeLike) -> HeadWork:
        q_norm, k_norm = (
            norm.weight[...] if isinstance(norm, RMSNorm) else None for norm in (self.q_norm, self.k_norm)
        )
        if self.config.qk_norm and not self.config.qk_norm_weight:
            q_norm = k_norm = jnp.ones((self.config.head_dim,), dtype)
        return HeadWork(
            bias=None if self.qkv.bias is None else self.qkv.bias[...],
            q_norm=q_norm,
            k_norm=k_norm,
            cos=None if rope is None else rope.cos,
            sin=None if rope is None else rope.sin,
            eps=self.norm_eps,
            offset=self.norm_offset,
        )
