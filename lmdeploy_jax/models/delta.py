"""Gated DeltaNet (Yang et al., 2024), the linear attention of Qwen3-Next and Qwen3.5."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jaxtyping import Float, Float32

from lmdeploy_jax.models.config import DecoderConfig
from lmdeploy_jax.models.kernels import Kernels, LayerCache
from lmdeploy_jax.models.linear import param
from lmdeploy_jax.models.norm import Norm, RMSNorm
from lmdeploy_jax.models.projections import ColumnParallelLinear, RowParallelLinear, whole
from lmdeploy_jax.models.recurrent_config import DeltaConfig
from lmdeploy_jax.models.residual import Delta, NextDelta
from lmdeploy_jax.models.rope import Rotation
from lmdeploy_jax.pallas_kernels.delta_rule import delta_rule
from lmdeploy_jax.pallas_kernels.short_conv import short_conv
from lmdeploy_jax.pallas_kernels.spans import Spans

UNIT_EPS = 1e-6  # of the norms of queries and keys


class GatedDeltaNet(nnx.Module):
    """Called as `Attention` is, with a step's `Spans` in the place of pages. All is laid out by key head, of
    which a device has its share: `qkvz` [H, 2 D + 2 R V, E] gives its query, its key, the values of its R
    value heads and their output gates, `ba` [H, 2 R, E] the strength of updates and the decay.
    """

    def __init__(
        self,
        model: DecoderConfig,
        config: DeltaConfig,
        *,
        added_plainly: bool,
        dtype: jnp.dtype,
        kernels: Kernels,
    ) -> None:
        self.config, self.kernels = config, kernels
        hidden, heads, per_key = model.hidden_size, config.key_heads, config.per_key
        cut: dict[str, Any] = {"bias": False, "dtype": dtype, "kernels": kernels}
        axes, wide = ("heads", None, "embed"), config.channels + per_key * config.value_dim
        self.qkvz = ColumnParallelLinear((heads, wide), (hidden,), axes, **cut)
        self.ba = ColumnParallelLinear((heads, 2 * per_key), (hidden,), axes, **cut)
        self.conv = param((heads, config.channels, 1, config.taps), dtype, ("heads", None, None, None))
        self.a_log, self.dt_bias = (
            param((heads, per_key), jnp.dtype("float32"), ("heads", None)) for _ in range(2)
        )
        self.norm = RMSNorm(config.value_dim, model.norm_eps, 0.0, dtype=dtype)
        inner, inner_axes = (heads, per_key, config.value_dim), ("embed", "heads", None, None)
        self.o = RowParallelLinear((hidden,), inner, inner_axes, added_up=added_plainly, **cut)

    def __call__(
        self,
        x: Float[Array, "T E"],
        delta: Delta | None,
        norm: Norm | None,
        cache: LayerCache,
        spans: Spans,
        rope: Rotation | None,
    ) -> tuple[Float[Array, "T E"], NextDelta, LayerCache]:
        x, normed = self.kernels.add_norm(x, delta, norm)
        config, (inputs, states) = self.config, cache
        backend = self.kernels.mixer_backend(config)
        qkvz, ba = (whole(linear(normed, None, None)[1], x.dtype) for linear in (self.qkvz, self.ba))
        mixed, gates = jnp.split(qkvz, [config.channels], axis=2)
        mixed, inputs = short_conv(mixed, self.conv[:, :, 0], inputs, spans, backend=backend)
        q, k, v = jnp.split(jax.nn.silu(mixed), [config.key_dim, 2 * config.key_dim], axis=2)
        q, k = (_unit(each) for each in (q, k))
        v, gates = (each.reshape(*each.shape[:2], -1, config.value_dim) for each in (v, gates))
        args = (q * config.key_dim**-0.5, k, v, *self._strengths(ba), states, spans)
        out, states = delta_rule(*args, backend=backend)
        out = self.norm(out.astype(x.dtype)) * jax.nn.silu(gates.astype(jnp.float32))
        return x, self.o(out.astype(x.dtype)), (inputs, states)

    def _strengths(
        self, ba: Float[Array, "T H N"]
    ) -> tuple[Float32[Array, "T H R"], Float32[Array, "T H R"]]:
        """Of each token and value head, the logarithm of the decay and the strength of the update."""
        b, a = jnp.split(ba.astype(jnp.float32), 2, axis=2)
        log_decay = -jnp.exp(self.a_log[...]) * jax.nn.softplus(a + self.dt_bias[...])
        return log_decay, jax.nn.sigmoid(b)


def _unit(x: Float[Array, "T H D"]) -> Float32[Array, "T H D"]:
    """Of length 1."""
    wide = x.astype(jnp.float32)
    return wide * lax.rsqrt(jnp.square(wide).sum(-1, keepdims=True) + UNIT_EPS)
