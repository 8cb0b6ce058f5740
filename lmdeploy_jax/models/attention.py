"""Grouped-query attention (Ainslie et al., 2023) over a paged KV cache."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jax import Array

from lmdeploy_jax.models.batch import Batch
from lmdeploy_jax.models.config import DecoderConfig
from lmdeploy_jax.models.kernels import AttentionKind, Cache, Kernels
from lmdeploy_jax.models.linear import Linear
from lmdeploy_jax.models.norm import RMSNorm
from lmdeploy_jax.models.rope import Rotation, rotate


class Attention(nnx.Module):
    """q, k and v in one product, laid out by KV head: `[KH, G + 2, D, E]`, G query heads, then k, then v."""

    def __init__(
        self, config: DecoderConfig, window: int | None, *, dtype: jnp.dtype, kernels: Kernels
    ) -> None:
        kv_heads = config.kv_heads(kernels.tp)
        groups, head_dim = config.num_heads // kv_heads, config.head_dim
        self.kernels = kernels
        self.kind = AttentionKind(config.attention_scale, window, config.attention_soft_cap)
        self.qkv = Linear(
            (kv_heads, groups + 2, head_dim),
            (config.hidden_size,),
            ("kv_heads", None, None, "embed"),
            bias=config.qkv_bias,
            dtype=dtype,
        )
        self.q_norm = _head_norm(config, dtype) if config.qk_norm else None
        self.k_norm = _head_norm(config, dtype) if config.qk_norm else None
        self.o = Linear(
            (config.hidden_size,),
            (kv_heads, groups, head_dim),
            ("embed", "kv_heads", None, None),
            bias=config.o_bias,
            dtype=dtype,
        )

    def __call__(self, x: Array, cache: Cache, batch: Batch, turn: Rotation | None) -> tuple[Array, Cache]:
        """x [T, E] -> [T, E], cache. `turn` is None in a layer without RoPE."""
        qkv = self.qkv(x)  # [T, KH, G + 2, D]
        q, k, v = qkv[:, :, :-2], qkv[:, :, -2], qkv[:, :, -1]
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if turn is not None:
            q, k = rotate(q, turn), rotate(k, turn)
        out, cache = self.kernels.attend(q, k, v, cache, batch, self.kind)
        return self.o(out), cache


def _head_norm(config: DecoderConfig, dtype: jnp.dtype) -> RMSNorm:
    return RMSNorm(config.head_dim, config.norm_eps, config.norm_offset, dtype=dtype)
