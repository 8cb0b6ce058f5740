"""Products with quantised weights that are multiplied as they are, rounded activations and all.

x is an array, or what the norm before the product has rounded already.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike
from jaxtyping import Float, Float32, Shaped

from lmdeploy_jax.models.kernels import Kernels
from lmdeploy_jax.models.linear import Linear
from lmdeploy_jax.models.norm import Norm, RMSNorm
from lmdeploy_jax.models.quantised import QuantWeight
from lmdeploy_jax.models.residual import Delta, PartialSum
from lmdeploy_jax.pallas_kernels.act_and_mul import act_and_mul, act_and_mul_quant
from lmdeploy_jax.pallas_kernels.quant_gemm import (
    gated_quant_gemm,
    norm_quant_gemm,
    quant_gemm,
    streamed_quant_gemm,
    unscaled_norm_quant_gemm,
    why_not_streamed,
)
from lmdeploy_jax.pallas_kernels.round_rows import round_rows
from lmdeploy_jax.pallas_kernels.shapes import Quantised, Unscaled
from lmdeploy_jax.pallas_kernels.skinny_gemm import StreamTiling, Tiling

MANY_ROWS = 1024
Rows = Float[Array, "T *inner"] | Quantised


class RowsProduct(Protocol):
    """A `products.Product` that also takes rounded rows."""

    def __call__(self, linear: Linear, x: Rows) -> Float[Array, "..."]:
        """See `products.Product`."""


@dataclass(frozen=True)
class RoundedProduct:
    """XLA's own of 8-bit activations and weights, for weights with a scale a row; each token has one too.

    backend: of the rounding.
    """

    out_dtype: DTypeLike | None = None
    backend: str = "xla"

    def __call__(self, linear: Linear, x: Rows) -> Float[Array, "..."]:
        weight = quantised(linear)
        flat, rows, outputs = self.unscaled(weight, x)
        flat = (flat.astype(jnp.float32) * (rows[:, None] * outputs)).astype(self.out_dtype or weight.dtype)
        return flat.reshape(-1, *weight.out_shape)

    def unscaled(
        self, weight: QuantWeight, x: Rows
    ) -> tuple[Shaped[Array, "T N"], Float32[Array, "T"], Float32[Array, "N"]]:
        """The sums, and the scales of rows and of outputs that they lack."""
        rows, arrays = _taken(weight, x, self.backend), weight.arrays()
        assert isinstance(rows, Quantised)
        values = arrays.values.reshape(-1, rows.values.shape[1])
        narrow, contracted = _sums(rows.values, weight.dtype), (((1,), (1,)), ((), ()))
        flat = lax.dot_general(rows.values, values, contracted, preferred_element_type=narrow)
        return flat, rows.scales[0], arrays.scales.astype(jnp.float32).reshape(-1)


@dataclass(frozen=True)
class SkinnyQuantProduct:
    """The hand-written product of a few rows, in f32 parts, or whole."""

    tiling: Tiling
    backend: str
    in_parts: bool = True

    def __call__(self, linear: Linear, x: Rows) -> Float[Array, "..."]:
        weight = quantised(linear)
        operand = weight.operand(-1)
        assert operand is not None  # as planned
        rows = _taken(weight, x, self.backend, wide=self.tiling.reads_wide)
        parts = quant_gemm(rows, operand, self.tiling, out_dtype=jnp.float32, backend=self.backend)
        parts = parts.reshape(*parts.shape[:2], *weight.out_shape)
        return parts if self.in_parts else parts[0]


@dataclass(frozen=True)
class SkinnyQuantGatedProduct:
    """`activation(gate) * up` of a weight [2, I, E] without a bias, hand-written."""

    activation: Callable[[Array], Array]
    tiling: Tiling
    backend: str

    def __call__(self, linear: Linear, x: Rows) -> Float[Array, "..."]:
        weight = quantised(linear)
        operand = weight.operand(2, weight.out_shape[1])
        assert operand is not None  # as planned
        how = {"activation": self.activation, "out_dtype": weight.dtype, "backend": self.backend}
        rows = _taken(weight, x, self.backend, wide=self.tiling.reads_wide)
        return gated_quant_gemm(rows, operand, self.tiling, **how)


@dataclass(frozen=True)
class StreamedQuantProduct:
    """The hand-written product for Hopper; in f32 parts where it is split."""

    tiling: StreamTiling
    backend: str

    def __call__(self, linear: Linear, x: Rows) -> Float[Array, "..."]:
        weight = quantised(linear)
        operand = weight.operand(-1)
        assert operand is not None  # as planned
        whole = self.tiling.splits == 1
        how = {"out_dtype": weight.dtype if whole else jnp.float32, "backend": self.backend}
        parts = streamed_quant_gemm(_taken(weight, x, self.backend), operand, self.tiling, **how)
        parts = parts.reshape(*parts.shape[:2], *weight.out_shape)
        return parts[0] if whole else parts


@dataclass(frozen=True)
class PartsGatedProduct:
    """`activation(gate) * up` of a weight [2, I, E] without a bias, after a product in parts."""

    activation: Callable[[Array], Array]
    product: SkinnyQuantProduct | StreamedQuantProduct

    def __call__(self, linear: Linear, x: Rows) -> Float[Array, "..."]:
        how = {"out_dtype": quantised(linear).dtype, "backend": self.product.backend}
        return act_and_mul(self.product(linear, x), activation=self.activation, **how)


QuantProduct = RoundedProduct | SkinnyQuantProduct | StreamedQuantProduct


@dataclass(frozen=True)
class RoundedGatedProduct:
    """`activation(gate) * up` of a weight [2, I, E] without a bias, rounded for the product with `reader` by
    the kernel that gates.
    """

    activation: Callable[[Array], Array]
    product: QuantProduct
    reader: QuantWeight
    backend: str

    def __call__(self, linear: Linear, x: Rows) -> Quantised:
        weight, kind = quantised(linear), self.reader.held.activations
        assert kind is not None  # as planned
        how: dict[str, Any] = {"groups": self.reader.groups, "scale": self.reader.arrays().input_scale}
        if isinstance(self.product, RoundedProduct):
            flat, how["row_scales"], scales = self.product.unscaled(weight, x)
            sums, how["scales"] = flat.reshape(-1, *weight.out_shape), scales.reshape(2, -1)
        else:
            sums = self.product(linear, x)
        how |= {"activation": self.activation, "out_dtype": weight.dtype, "backend": self.backend}
        return act_and_mul_quant(sums if sums.ndim == 4 else sums[None], kind, **how)


@dataclass(frozen=True)
class FusedQuantNorm:
    """One kernel does all of it, for one row; the product is one part, or gated by `activation`."""

    tiling: Tiling
    backend: str
    activation: Callable[[Array], Array] | None = None

    def __call__(
        self, linear: Linear, x: Float[Array, "T E"], delta: Delta | None, norm: Norm | None
    ) -> tuple[Float[Array, "T E"], Float[Array, "..."]]:
        assert delta is not None  # as planned
        assert not isinstance(delta, PartialSum)
        assert isinstance(norm, RMSNorm)
        weight, gated = quantised(linear), self.activation is not None
        operand = weight.operand(2, weight.out_shape[1]) if gated else weight.operand(-1)
        assert operand is not None
        x, flat = norm_quant_gemm(
            x,
            delta,
            norm.weight[...],
            operand,
            self.tiling,
            activation=self.activation,
            eps=norm.eps,
            offset=norm.offset,
            out_dtype=x.dtype if gated else jnp.float32,
            backend=self.backend,
        )
        return x, flat if gated else flat.reshape(1, 1, *weight.out_shape)


@dataclass(frozen=True)
class UnscaledQuantNorm:
    """The same in parts, without the norm's scale."""

    tiling: Tiling
    backend: str

    def __call__(
        self, linear: Linear, x: Float[Array, "T E"], delta: Float[Array, "*S T E"], norm: RMSNorm
    ) -> tuple[Float[Array, "T E"], Unscaled]:
        operand = quantised(linear).operand(-1)
        assert operand is not None  # as planned
        how: dict[str, Any] = {"eps": norm.eps, "offset": norm.offset, "backend": self.backend}
        return unscaled_norm_quant_gemm(x, delta, norm.weight[...], operand, self.tiling, **how)


@dataclass(frozen=True)
class RoundingNorm:
    """The residual addition and the norm are a kernel of their own, which rounds what the product reads."""

    product: RowsProduct
    kernels: Kernels

    def __call__(
        self, linear: Linear, x: Float[Array, "T E"], delta: Delta | None, norm: Norm | None
    ) -> tuple[Float[Array, "T E"], Any]:
        if delta is None or not isinstance(norm, RMSNorm):
            x, normed = self.kernels.add_norm(x, delta, norm)
            return x, self.product(linear, normed)
        weight = quantised(linear)
        assert weight.held.activations is not None  # as planned
        how = {"groups": weight.groups, "scale": weight.arrays().input_scale}
        x, rows = self.kernels.add_norm_quant(x, delta, norm, weight.held.activations, **how)
        return x, self.product(linear, rows)


def _sums(rows: Array, dtype: DTypeLike) -> DTypeLike:
    """The type of sums that are scaled afterwards, by a kernel of its own.

    Those of many rows leave the caches between the two, so that f32 would take a tenth of a prompt's time.
    """
    if rows.dtype == jnp.int8:
        return jnp.int32
    return jnp.bfloat16 if dtype == jnp.bfloat16 and len(rows) >= MANY_ROWS else jnp.float32


def quantised(linear: Linear) -> QuantWeight:
    """The weight, as planned."""
    assert isinstance(linear.weight, QuantWeight)
    return linear.weight


def can_stream(linear: Linear, tokens: int) -> bool:
    """Whether a `StreamedQuantProduct` of so many rows is one that its kernel can do."""
    operand = quantised(linear).operand(-1)
    return operand is not None and why_not_streamed(tokens, operand) is None


def _taken(
    weight: QuantWeight, x: Rows, backend: str, *, wide: bool = False
) -> Float[Array, "T K"] | Quantised:
    """x as the product takes it: rounded, or as it is where the product reads it `wide`."""
    if isinstance(x, Quantised):
        return x
    rows, kind = x.reshape(x.shape[0], -1), weight.held.activations
    if kind is None or wide:
        return rows
    scale = weight.arrays().input_scale
    return round_rows(rows, kind, groups=weight.groups, scale=scale, backend=backend)
