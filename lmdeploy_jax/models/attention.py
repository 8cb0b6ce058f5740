"""Grouped-query attention (Ainslie et al., 2023) over a paged KV cache."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float

from lmdeploy_jax.models.batch import AttentionMetadata
from lmdeploy_jax.models.config import AttentionConfig, DecoderConfig
from lmdeploy_jax.models.kernels import Kernels, LayerCache
from lmdeploy_jax.models.norm import RMSNorm
from lmdeploy_jax.models.projections import ColumnParallelLinear, RowParallelLinear
from lmdeploy_jax.models.rope import Rotation
from lmdeploy_jax.pallas_kernels.rope_kv_write import HeadWork


class Attention(nnx.Module):
    """q, k and v in one product, laid out by KV head: `[KH, G + 2, D, E]`, G query heads, then k, then v.

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
        self.qkv = ColumnParallelLinear(
            (kv_heads, groups + 2, head_dim),
            (model.hidden_size,),
            ("kv_heads", None, None, "embed"),
            bias=config.qkv_bias,
            dtype=dtype,
            kernels=kernels,
        )
        self.q_norm = self._head_norm(head_dim, dtype) if config.qk_norm else None
        self.k_norm = self._head_norm(head_dim, dtype) if config.qk_norm else None
        self.o = RowParallelLinear(
            (model.hidden_size,),
            (kv_heads, groups, head_dim),
            ("embed", "kv_heads", None, None),
            bias=config.o_bias,
            dtype=dtype,
            kernels=kernels,
            added_up=added_plainly,
        )

    def _head_norm(self, head_dim: int, dtype: jnp.dtype) -> RMSNorm:
        return RMSNorm(head_dim, self.norm_eps, self.norm_offset, dtype=dtype)

    def __call__(
        self,
        x: Float[Array, "T E"],
        delta: Float[Array, "*S T E"] | None,
        norm: RMSNorm | None,
        cache: LayerCache,
        metadata: AttentionMetadata,
        rope: Rotation | None,
    ) -> tuple[Float[Array, "T E"], Float[Array, "*parts T E"], LayerCache]:
        """`Kernels.add_norm` of the first three, and attention -> x, what is added to it next, cache.

        `rope` is None in a layer without RoPE.
        """
        x, qkv = self.qkv(x, delta, norm)  # [(S,) T, KH, G + 2, D]
        work = self._work(rope)
        out, cache = self.kernels.attend(qkv, work, cache, metadata, self.config, dtype=x.dtype)
        return x, self.o(out), cache

    def _work(self, rope: Rotation | None) -> HeadWork:
        cos, sin = (None, None) if rope is None else rope
        return HeadWork(
            bias=None if self.qkv.bias is None else self.qkv.bias[...],
            q_norm=None if self.q_norm is None else self.q_norm.weight[...],
            k_norm=None if self.k_norm is None else self.k_norm.weight[...],
            cos=cos,
            sin=sin,
            eps=self.norm_eps,
            offset=self.norm_offset,
        )
