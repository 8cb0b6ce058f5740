"""What tower and projector are made of."""

from __future__ import annotations

from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from lmdeploy_jax.models.linear import Linear, param
from lmdeploy_jax.models.norm import RMSNorm
from lmdeploy_jax.models.products import ACTIVATIONS as DECODER_ACTIVATIONS
from lmdeploy_jax.models.products import dense_product
from lmdeploy_jax.pallas_kernels.fused_dense import (
    RowNorm,
    fused_dense,
    gelu,
    in_one_round,
    why_not_mosaic,
)
from lmdeploy_jax.vision.config import NormConfig


def _quick_gelu(x: Array) -> Array:
    return x * jax.nn.sigmoid(1.702 * x)


def _gelu(x: Array) -> Array:
    """Exact but for bfloat16. `jax.nn.gelu` takes erfc, 2.6 times the instructions, for a tail that 16 bits
    don't have.
    """
    wide = x.astype(jnp.float32)
    if x.dtype == jnp.bfloat16:
        return gelu(wide).astype(x.dtype)
    return (0.5 * wide * (1 + lax.erf(wide * SQRT_HALF))).astype(x.dtype)


SQRT_HALF = 0.5**0.5
ACTIVATIONS = {**DECODER_ACTIVATIONS, "gelu": _gelu, "quick_gelu": _quick_gelu}
FUSED = {"gelu": gelu}  # activations that a product's kernel has, in bfloat16


class LayerNorm(nnx.Module):
    """Normalises the last axis in float32, with a weight and a bias (Ba et al., 2016) or without."""

    def __init__(self, size: int, eps: float, *, dtype: jnp.dtype, weighted: bool = True) -> None:
        self.eps = eps
        self.weight = param((size,), dtype, (None,)) if weighted else None
        self.bias = param((size,), dtype, (None,)) if weighted else None

    def __call__(self, x: Array) -> Array:
        wide = x.astype(jnp.float32)
        centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
        normed = centred * lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + self.eps)
        if self.weight is None or self.bias is None:
            return normed.astype(x.dtype)
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
    if config.kind == "layer":
        return LayerNorm(config.width, config.eps, dtype=dtype, weighted=config.weighted)
    if not config.weighted:
        return PlainRMSNorm(config.eps)
    return RMSNorm(config.width, config.eps, config.offset, dtype=dtype)


class Dense(Linear):
    """A product whose weight [*out, *inner] every device holds whole, of rows that a `norm` without a weight
    stands before, if there is one: a kernel takes its statistics, and `column_sums` of the weight.
    """

    def __init__(
        self,
        out: tuple[int, ...],
        inner: tuple[int, ...],
        *,
        bias: bool,
        dtype: jnp.dtype,
        backend: str = "xla",
        norm: NormConfig | None = None,
    ) -> None:
        super().__init__(out, inner, (None,) * (len(out) + len(inner)), bias=bias, dtype=dtype)
        self.backend = backend
        self.norm = None if norm is None else make_norm(norm, dtype=dtype)
        centres = norm is not None and norm.kind == "layer"
        self.column_sums = param((prod(out),), jnp.dtype("float32"), (None,)) if centres else None

    def __call__(self, x: Array, *, activation: str | None = None, residual: Array | None = None) -> Array:
        """x [T, *inner], residual [T, *out] -> [T, *out]."""
        if self._fuses(x, activation, adds=residual is not None):
            return self._fused(x, activation, residual)
        y = dense_product(*self._aligned(x if self.norm is None else self.norm(x)))
        y = y if self.bias is None else y + self.bias[...]
        y = y if activation is None else ACTIVATIONS[activation](y)
        return y if residual is None else residual + y

    def _fused(self, x: Array, activation: str | None, residual: Array | None) -> Array:
        weight, out = self.weight.dense().reshape(-1, prod(x.shape[1:])), self.out_shape(x)
        sums = None if self.column_sums is None else self.column_sums[...]
        assert self.bias is not None
        done = fused_dense(
            x.reshape(len(x), -1),
            weight,
            self.bias[...].reshape(-1),
            activation=None if activation is None else FUSED[activation],
            norm=None if self.norm is None else RowNorm(self.norm.eps, sums),
            residual=None if residual is None else residual.reshape(len(x), -1),
            backend=self.backend,
        )
        return done.reshape(len(x), *out)

    def _aligned(self, x: Array) -> tuple[Array, Array]:
        """x and the weight as GPUs multiply them fast: with columns by eights, 588 of a patch's pixels are a
        quarter of the speed.
        """
        weight, columns = self.weight.dense(), prod(x.shape[1:])
        if self.backend == "xla" or columns % 8 == 0 or self.out_axes > 1:
            return x, weight
        pad = partial(jnp.pad, pad_width=((0, 0), (0, -columns % 64)))
        return pad(x.reshape(-1, columns)), pad(weight.reshape(-1, columns))

    def _fuses(self, x: Array, activation: str | None, *, adds: bool) -> bool:
        """Whether one kernel does all of it."""
        columns, outputs = prod(x.shape[1:]), prod(self.out_shape(x))
        known = self.bias is not None and (activation is None or activation in FUSED)
        if self.backend != "mosaic" or not known or x.dtype != jnp.bfloat16:
            return False
        if why_not_mosaic(len(x), (outputs, columns), x.dtype) is not None:
            return False
        return self.norm is not None or activation is not None or (adds and in_one_round(len(x), outputs))


class ClippedDense(Dense):
    """One or several products side by side, each with bounds of its own for what enters it and what leaves:
    [parts, 4], least and most before, least and most behind it.
    """

    def __init__(self, out: tuple[int, ...], inner: tuple[int, ...], **how: Any) -> None:
        super().__init__(out, inner, **how)
        self.parts = out[0] if len(out) > 1 else 1
        self.bounds = param((self.parts, 4), jnp.dtype("float32"), (None, None))

    def __call__(self, x: Array, *, activation: str | None = None, residual: Array | None = None) -> Array:
        """x [T, *inner] -> [T, *out]."""
        assert residual is None, "`TowerConfig.fusable` has no clipped products"
        weight = self.weight.dense()
        weights = weight if self.parts > 1 else weight[None]
        done = [self._clipped(x, weights[part], self.bounds[part]) for part in range(self.parts)]
        y = jnp.stack(done, axis=1) if self.parts > 1 else done[0]
        return y if activation is None else ACTIVATIONS[activation](y)

    @staticmethod
    def _clipped(x: Array, weight: Array, bounds: Array) -> Array:
        least, most, lowest, highest = (bounds[i].astype(x.dtype) for i in range(4))
        return jnp.clip(dense_product(jnp.clip(x, least, most), weight), lowest, highest)


def product(clipped: bool) -> type[Dense]:
    """The kind of products of a tower's layers."""
    return ClippedDense if clipped else Dense


class MLP(nnx.Module):
    """`down(activation(up(x)))`."""

    def __init__(
        self, width: int, inner: int, activation: str, norm: NormConfig | None = None, **how: Any
    ) -> None:
        self.activation = activation
        self.up = Dense((inner,), (width,), norm=norm, **how)
        self.down = Dense((width,), (inner,), **how)

    def __call__(self, x: Array, residual: Array | None = None) -> Array:
        """x [T, width] -> the same."""
        return self.down(self.up(x, activation=self.activation), residual=residual)


class GatedMLP(nnx.Module):
    """`down(activation(gate(x)) * up(x))`, gate and up in one product."""

    def __init__(
        self,
        width: int,
        inner: int,
        out: int,
        activation: str,
        *,
        clipped: bool = False,
        **how: Any,
    ) -> None:
        self.activation = activation
        self.gate_up = product(clipped)((2, inner), (width,), **how)
        self.down = product(clipped)((out,), (inner,), **how)

    def __call__(self, x: Array) -> Array:
        """x [T, width] -> [T, out]."""
        gate_up = self.gate_up(x)
        return self.down(ACTIVATIONS[self.activation](gate_up[:, 0]) * gate_up[:, 1])
