"""Multi-head latent attention (DeepSeek-V2, 2024), in the space of the latents: what is cached is all that is
read.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float

from lmdeploy_jax.models.batch import AttentionMetadata
from lmdeploy_jax.models.config import DecoderConfig, LatentConfig
from lmdeploy_jax.models.kernels import Kernels, LayerCache
from lmdeploy_jax.models.linear import Linear
from lmdeploy_jax.models.norm import Norm, RMSNorm
from lmdeploy_jax.models.products import dense_product
from lmdeploy_jax.models.projections import ColumnParallelLinear, RowParallelLinear, whole
from lmdeploy_jax.models.residual import Delta, NextDelta
from lmdeploy_jax.models.rope import Rotation
from lmdeploy_jax.pallas_kernels.rope_kv_write import HeadWork


class LatentAttention(nnx.Module):
    """Called as `Attention` is. `kv_b` [H, P + V, R] makes keys and values of a latent; here it takes queries
    into the latents' space, and outputs from there.
    """

    def __init__(
        self,
        model: DecoderConfig,
        config: LatentConfig,
        *,
        added_plainly: bool,
        dtype: jnp.dtype,
        kernels: Kernels,
    ) -> None:
        self.config = config
        self.kernels = kernels
        hidden, heads, rank = model.hidden_size, config.heads, config.latent_rank
        how: dict[str, Any] = {"dtype": dtype, "bias": config.bias}
        cut: dict[str, Any] = {"dtype": dtype, "kernels": kernels}
        query, axes = (heads, config.nope_dim + config.rope_dim), ("heads", None, None)
        if config.query_rank is None:
            self.q = ColumnParallelLinear(query, (hidden,), ("heads", None, "embed"), bias=False, **cut)
        else:
            self.q_a = Linear((config.query_rank,), (hidden,), (None, "embed"), **how)
            self.q_a_norm = RMSNorm(config.query_rank, config.norm_eps, 0.0, dtype=dtype)
            self.q_b = ColumnParallelLinear(query, (config.query_rank,), axes, bias=False, **cut)
        self.kv_a = Linear((rank + config.rope_dim,), (hidden,), (None, "embed"), **how)
        self.kv_a_norm = RMSNorm(rank, config.norm_eps, 0.0, dtype=dtype)
        both = (heads, config.nope_dim + config.value_dim)
        self.kv_b = Linear(both, (rank,), axes, bias=False, dtype=dtype)
        self.o = RowParallelLinear(
            (hidden,),
            (heads, config.value_dim),
            ("embed", "heads", None),
            bias=config.bias,
            added_up=added_plainly,
            **cut,
        )

    def __call__(
        self,
        x: Float[Array, "T E"],
        delta: Delta | None,
        norm: Norm | None,
        cache: LayerCache,
        metadata: AttentionMetadata,
        rope: Rotation | None,
    ) -> tuple[Float[Array, "T E"], NextDelta, LayerCache]:
        x, normed = self.kernels.add_norm(x, delta, norm)
        turn = (None, None) if rope is None else (rope.cos, rope.sin)
        work = HeadWork(None, None, self.kv_a_norm.weight[...], *turn, self.config.norm_eps)
        arrays = (self._queries(normed), _product(self.kv_a, normed), self.kv_b.weight.dense(), work)
        out, cache = self.kernels.attend_latent(*arrays, cache, metadata, self.config)
        return x, self.o(out), cache

    def _queries(self, x: Float[Array, "T E"]) -> Float[Array, "T H D"]:
        if self.config.query_rank is None:
            product = self.q(x, None, None)[1]
        else:
            product = self.q_b(self.q_a_norm(_product(self.q_a, x)), None, None)[1]
        return whole(product, x.dtype)


def _product(linear: Linear, x: Float[Array, "T E"]) -> Float[Array, "T N"]:
    """With a weight that every device has whole."""
    product = dense_product(x, linear.weight.dense())
    return product if linear.bias is None else product + linear.bias[...]
