"""Mamba 2 (Dao and Gu, 2024), the state space layers of Nemotron-H, Granite 4 and Falcon-H1."""

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
from lmdeploy_jax.models.norm import Norm
from lmdeploy_jax.models.projections import ColumnParallelLinear, RowParallelLinear, whole
from lmdeploy_jax.models.recurrent_config import Mamba2Config
from lmdeploy_jax.models.residual import Delta, NextDelta
from lmdeploy_jax.models.rope import Rotation
from lmdeploy_jax.pallas_kernels.short_conv import short_conv
from lmdeploy_jax.pallas_kernels.spans import Spans
from lmdeploy_jax.pallas_kernels.ssd import ssd


class Mamba2(nnx.Module):
    """Called as `Attention` is, with a step's `Spans` in the place of pages. All is laid out by group, of
    which a device has its share: `xbczdt` [G, 2 R P + 2 N + R, E] gives the inputs of its R heads, its B and
    C, the heads' gates and their steps of time.
    """

    def __init__(
        self,
        model: DecoderConfig,
        config: Mamba2Config,
        *,
        added_plainly: bool,
        dtype: jnp.dtype,
        kernels: Kernels,
    ) -> None:
        self.config, self.kernels, self.eps = config, kernels, model.norm_eps
        groups, per_group = config.held_groups(kernels.tp), config.per_group(kernels.tp)
        self.replicas = groups // config.groups
        inner, channels = per_group * config.head_dim, config.channels(kernels.tp)
        self.sizes = (inner, config.state_dim, config.state_dim, inner, per_group)
        cut: dict[str, Any] = {"bias": config.bias, "dtype": dtype, "kernels": kernels}
        hidden, axes, wide = model.hidden_size, ("heads", None), jnp.dtype("float32")
        self.xbczdt = ColumnParallelLinear((groups, sum(self.sizes)), (hidden,), (*axes, "embed"), **cut)
        self.conv = param((groups, channels, 1, config.taps), dtype, (*axes, None, None))
        self.conv_bias = param((groups, channels), dtype, axes) if config.conv_bias else None
        self.a_log, self.d, self.dt_bias = (param((groups, per_group), wide, axes) for _ in range(3))
        self.norm = param((groups, inner), dtype, axes) if config.norm else None
        shape, o_axes = (groups, per_group, config.head_dim), ("embed", "heads", None, None)
        self.o = RowParallelLinear((hidden,), shape, o_axes, added_up=added_plainly, **cut)

    def __call__(
        self,
        x: Float[Array, "T E"],
        delta: Delta | None,
        norm: Norm | None,
        cache: LayerCache,
        spans: Spans,
        rope: Rotation | None,
    ) -> tuple[Float[Array, "T E"], NextDelta, LayerCache]:
        x, product = self.xbczdt(x, delta, norm)
        mixed, gates, dt = self._parts(whole(product, x.dtype, _value(self.xbczdt.bias)))
        (inputs, states), backend = cache, self.kernels.mixer_backend(self.config)
        how: dict[str, Any] = {"bias": _value(self.conv_bias), "backend": backend}
        mixed, inputs = short_conv(mixed, self.conv[:, :, 0], inputs, spans, **how)
        inner, state = self.sizes[:2]
        u, b, c = jnp.split(jax.nn.silu(mixed), [inner, inner + state], axis=2)
        u = u.reshape(*u.shape[:2], -1, self.config.head_dim)
        dt, a = jax.nn.softplus(dt.astype(jnp.float32) + self.dt_bias[...]), -jnp.exp(self.a_log[...])
        out, states = ssd(u, dt, a, b, c, self.d[...], states, spans, backend=backend)
        out = self._gated(out.reshape(gates.shape), gates).astype(x.dtype)
        return x, self.o(out.reshape(u.shape)), (inputs, states)

    def _parts(
        self, product: Float[Array, "T G W"]
    ) -> tuple[Float[Array, "T G C"], Float[Array, "T G I"], Float[Array, "T G R"]]:
        """What the convolution reads, the gates, and the steps of time."""
        if self.config.input_multipliers != (1.0,) * 5:
            each = jnp.array(self.config.input_multipliers, product.dtype)
            factors = jnp.repeat(each, jnp.array(self.sizes), total_repeat_length=sum(self.sizes))
            product = product * factors
        inner = self.sizes[0]
        mixed, gates, dt = jnp.split(product, [sum(self.sizes[:3]), sum(self.sizes[:3]) + inner], axis=2)
        return mixed, gates, dt

    def _gated(self, out: Float32[Array, "T G I"], gates: Float[Array, "T G I"]) -> Float32[Array, "T G I"]:
        gate, place = jax.nn.silu(gates.astype(jnp.float32)), self.config.norm
        out = out * gate if place != "before_gate" else self._normed(out) * gate
        out = self._normed(out) if place == "after_gate" else out
        return out if self.config.output_multiplier == 1.0 else out * self.config.output_multiplier

    def _normed(self, out: Float32[Array, "T G I"]) -> Float32[Array, "T G I"]:
        """By the mean square of each group, of which a device may have a part."""
        assert self.norm is not None
        squares = jnp.square(out).sum(2)
        if self.replicas > 1:
            squares = self.kernels.collectives.all_reduce(squares, squares.dtype)
        mean = squares / (self.replicas * out.shape[2])
        return out * lax.rsqrt(mean + self.eps)[..., None] * self.norm[...].astype(jnp.float32)


def _value(leaf: nnx.Param | None) -> Array | None:
    return None if leaf is None else leaf[...]
