"""What tower and projector are made of."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from lmdeploy_jax.models.linear import Linear, param
from lmdeploy_jax.models.norm import RMSNorm
from lmdeploy_jax.models.products import ACTIVATIONS as DECODER_ACTIVATIONS
from lmdeploy_jax.models.products import dense_product
from lmdeploy_jax.vision.config import NormConfig


def _quick_gelu(x: Array) -> Array:
    return x * jax.nn.sigmoid(1.702 * x)


def _gelu(x: Array) -> Array:
    """Exact. `jax.nn.gelu` takes erfc, 2.6 times the instructions, for a tail that 16 bits don't have."""
    wide = x.astype(jnp.float32)
    return (0.5 * wide * (1 + lax.erf(wide * SQRT_HALF))).astype(x.dtype)


SQRT_HALF = 0.5**0.5
ACTIVATIONS = {**DECODER_ACTIVATIONS, "gelu": _gelu, "quick_gelu": _quick_gelu}


class LayerNorm(nnx.Module):
    """Normalises the last axis in float32, with a weight and a bias (Ba et al., 2016)."""

    def __init__(self, size: int, eps: float, *, dtype: jnp.dtype) -> None:
        self.eps = eps
        self.weight = param((size,), dtype, (None,))
        self.bias = param((size,), dtype, (None,))

    def __call__(self, x: Array) -> Array:
        wide = x.astype(jnp.float32)
        centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
        normed = centred * lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + self.eps)
        weight, bias = self.weight[...].astype(jnp.float32), self.bias[...].astype(jnp.float32)
        return (normed * weight + bias).astype(x.dtype)


class PlainRMSNorm(nnx.Module):
    """RMSNorm of the last axis, in float32, without a weight."""

    def __init__(self, eps: float) -> None:
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        wide = x.astype(jnp.float32)
        normed = wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return normed.astype(x.dtype)


def make_norm(config: NormConfig, *, dtype: jnp.dtype) -> LayerNorm | RMSNorm | PlainRMSNorm:
    """The norm of a config."""
    if not config.weighted:
        return PlainRMSNorm(config.eps)
    if config.kind == "layer":
        return LayerNorm(config.width, config.eps, dtype=dtype)
    return RMSNorm(config.width, config.eps, config.offset, dtype=dtype)


class Dense(Linear):
    """A product whose weight [*out, *inner] every device holds whole."""

    def __init__(self, out: tuple[int, ...], inner: tuple[int, ...], *, bias: bool, dtype: jnp.dtype) -> None:
        super().__init__(out, inner, (None,) * (len(out) + len(inner)), bias=bias, dtype=dtype)

    def __call__(self, x: Array) -> Array:
        """x [T, *inner] -> [T, *out]."""
        y = dense_product(x, self.weight.dense())
        return y if self.bias is None else y + self.bias[...]


class ClippedDense(Dense):
    """One or several products side by side, each with bounds of its own for what enters it and what leaves:
    [parts, 4], least and most before, least and most behind it.
    """

    def __init__(self, out: tuple[int, ...], inner: tuple[int, ...], *, bias: bool, dtype: jnp.dtype) -> None:
        super().__init__(out, inner, bias=bias, dtype=dtype)
        self.parts = out[0] if len(out) > 1 else 1
        self.bounds = param((self.parts, 4), jnp.dtype("float32"), (None, None))

    def __call__(self, x: Array) -> Array:
        """x [T, *inner] -> [T, *out]."""
        weight = self.weight.dense()
        weights = weight if self.parts > 1 else weight[None]
        done = [self._clipped(x, weights[part], self.bounds[part]) for part in range(self.parts)]
        return jnp.stack(done, axis=1) if self.parts > 1 else done[0]

    @staticmethod
    def _clipped(x: Array, weight: Array, bounds: Array) -> Array:
        least, most, lowest, highest = (bounds[i].astype(x.dtype) for i in range(4))
        return jnp.clip(dense_product(jnp.clip(x, least, most), weight), lowest, highest)


def product(clipped: bool) -> type[Dense]:
    """The kind of products of a tower's layers."""
    return ClippedDense if clipped else Dense


class MLP(nnx.Module):
    """`down(activation(up(x)))`."""

    def __init__(self, width: int, inner: int, activation: str, *, bias: bool, dtype: jnp.dtype) -> None:
        self.activation = activation
        self.up = Dense((inner,), (width,), bias=bias, dtype=dtype)
        self.down = Dense((width,), (inner,), bias=bias, dtype=dtype)

    def __call__(self, x: Array) -> Array:
        """x [T, width] -> the same."""
        return self.down(ACTIVATIONS[self.activation](self.up(x)))


class GatedMLP(nnx.Module):
    """`down(activation(gate(x)) * up(x))`, gate and up in one product."""

    def __init__(
        self,
        width: int,
        inner: int,
        out: int,
        activation: str,
        *,
        bias: bool,
        dtype: jnp.dtype,
        clipped: bool = False,
    ) -> None:
        self.activation = activation
        self.gate_up = product(clipped)((2, inner), (width,), bias=bias, dtype=dtype)
        self.down = product(clipped)((out,), (inner,), bias=bias, dtype=dtype)

    def __call__(self, x: Array) -> Array:
        """x [T, width] -> [T, out]."""
        gate_up = self.gate_up(x)
        return self.down(ACTIVATIONS[self.activation](gate_up[:, 0]) * gate_up[:, 1])
