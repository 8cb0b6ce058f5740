"""Gated short convolutions, the layers of LFM2 that are no attention."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float

from lmdeploy_jax.models.config import DecoderConfig
from lmdeploy_jax.models.kernels import Kernels, LayerCache
from lmdeploy_jax.models.linear import param
from lmdeploy_jax.models.norm import Norm
from lmdeploy_jax.models.projections import ColumnParallelLinear, RowParallelLinear, whole
from lmdeploy_jax.models.recurrent_config import ShortConvConfig
from lmdeploy_jax.models.residual import Delta, NextDelta
from lmdeploy_jax.models.rope import Rotation
from lmdeploy_jax.pallas_kernels.short_conv import short_conv
from lmdeploy_jax.pallas_kernels.spans import Spans


class ShortConv(nnx.Module):
    """Called as `Attention` is, with a step's `Spans` in the place of pages. `bcx` [H, 3 D, E] gives, of each
    part of the channels, the gate before the convolution, that behind it, and its input.
    """

    def __init__(
        self,
        model: DecoderConfig,
        config: ShortConvConfig,
        *,
        added_plainly: bool,
        dtype: jnp.dtype,
        kernels: Kernels,
    ) -> None:
        self.config, self.kernels = config, kernels
        shape, hidden, axes = (config.heads, config.head_dim), model.hidden_size, ("heads", None)
        cut: dict[str, Any] = {"bias": config.bias, "dtype": dtype, "kernels": kernels}
        self.bcx = ColumnParallelLinear((shape[0], 3 * shape[1]), (hidden,), (*axes, "embed"), **cut)
        self.conv = param((*shape, 1, config.taps), dtype, (*axes, None, None))
        self.conv_bias = param(shape, dtype, axes) if config.bias else None
        self.o = RowParallelLinear((hidden,), shape, ("embed", *axes), added_up=added_plainly, **cut)

    def __call__(
        self,
        x: Float[Array, "T E"],
        delta: Delta | None,
        norm: Norm | None,
        cache: LayerCache,
        spans: Spans,
        rope: Rotation | None,
    ) -> tuple[Float[Array, "T E"], NextDelta, LayerCache]:
        x, product = self.bcx(x, delta, norm)
        bias = None if self.bcx.bias is None else self.bcx.bias[...]
        b, c, inputs = jnp.split(whole(product, x.dtype, bias), 3, axis=2)
        conv_bias = None if self.conv_bias is None else self.conv_bias[...]
        how: dict[str, Any] = {"bias": conv_bias, "backend": self.kernels.mixer_backend(self.config)}
        mixed, last = short_conv(b * inputs, self.conv[:, :, 0], cache[0], spans, **how)
        return x, self.o(c * mixed), (last,)
