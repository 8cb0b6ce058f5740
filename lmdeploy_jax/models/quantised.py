"""A weight that stays quantised on the devices."""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jax.typing import DTypeLike
from jaxtyping import Float, Float32, Int32, Shaped

from lmdeploy_jax.models.formats import E2M1, E8M0, FOUR_BITS, INT4, WeightFormat
from lmdeploy_jax.models.linear import Axes, DenseWeight, Linear, param
from lmdeploy_jax.pallas_kernels.grouped_matmul import why_not_widened
from lmdeploy_jax.pallas_kernels.quant_gemm import why_not_quant
from lmdeploy_jax.pallas_kernels.quant_gemm.words import E2M1_VALUES, TILE, unpack_words
from lmdeploy_jax.pallas_kernels.shapes import Quantised


class QuantArrays(NamedTuple):
    """The arrays of a weight; see `WeightFormat` for their shapes."""

    values: Array
    scales: Array
    zeros: Array | None = None
    row_scales: Array | None = None
    columns: Array | None = None
    input_scale: Array | None = None


class QuantWeight(nnx.Module):
    """A `Weight` in several leaves, as its `WeightFormat` has them, in place of a dense one."""

    def __init__(self, dense: DenseWeight, out_axes: int, held: WeightFormat) -> None:
        axes: Axes = dense.axes
        out, outer, across = tuple(dense.shape[:out_axes]), axes[:out_axes], axes[out_axes]
        self.held = held
        self.inner = tuple(dense.shape[out_axes:])
        self.dtype = dense.dtype
        columns = prod(self.inner) // held.per_value
        self.values = param((*out, columns), jnp.dtype(held.stored), (*outer, across))
        grouped, named = (held.groups, *out), (across if held.groups > 1 else None, *outer)
        self.scales = param(grouped, jnp.dtype("uint8" if held.scale == E8M0 else held.scale), named)
        self.zeros = param(grouped, jnp.dtype(held.zeros), named) if held.zeros else None
        self.row_scales = param(out, jnp.dtype("float32"), outer) if held.row_scales else None
        self.columns = (
            param((columns * held.per_value,), jnp.dtype("int32"), (None,)) if held.columns else None
        )

        self.input_scale = param((1,), jnp.dtype("float32"), (None,)) if held.input_scale else None

    @property
    def format(self) -> str:
        return self.held.name

    @property
    def shape(self) -> tuple[int, ...]:
        """[*out, *inner] on this device, which may have a share of the first axis of either."""
        columns = self.values.shape[-1] * self.held.per_value
        return (*self.values.shape[:-1], columns // prod(self.inner[1:]), *self.inner[1:])

    def arrays(self) -> QuantArrays:
        """The leaves' arrays, on this device."""
        found = (self.values, self.scales, self.zeros, self.row_scales, self.columns, self.input_scale)
        return QuantArrays(*(None if leaf is None else leaf[...] for leaf in found))  # type: ignore[arg-type]

    @property
    def groups(self) -> int:
        """Of columns, on this device."""
        return self.scales.shape[0]

    @property
    def out_shape(self) -> tuple[int, ...]:
        """[*out] of a product, on this device."""
        return self.shape[: -len(self.inner)]

    def operand(self, *out: int) -> Quantised | None:
        """The weight [*out, K] as the kernels take it, `out` perhaps with -1; None: they cannot read it."""
        held, arrays = self.held, self.arrays()
        four = held.element == INT4 and held.tile == TILE and self.dtype == jnp.bfloat16
        eight = held.element == held.activations and held.element not in FOUR_BITS
        if not (four or eight) or held.scale == E8M0 or held.row_scales or held.columns:
            return None
        scales, zeros = (
            None if array is None else array.reshape(self.groups, *out)
            for array in (arrays.scales, arrays.zeros)
        )
        assert scales is not None
        found = Quantised(arrays.values.reshape(*out, arrays.values.shape[-1]), scales, zeros)
        return found if why_not_quant(found) is None else None

    def experts(self) -> Quantised | None:
        """The weights [X, *out, K] as the kernels of grouped products take them; None: they cannot."""
        held = self.held
        exponents = held.element == E2M1, held.scale == E8M0  # one with the other, as in MXFP4
        if exponents[0] != exponents[1] or held.row_scales or held.columns:
            return None
        found = Quantised(*self.arrays()[:3])
        return found if why_not_widened(found) is None else None

    def dense(self) -> Float[Array, "..."]:
        """What is multiplied with where no kernel reads the format itself."""
        return dequantise(self.held, self.arrays(), self.dtype).reshape(self.shape)

    def dense_at(self, index: Int32[Array, ""]) -> Float[Array, "..."]:
        """`dense()[index]`, of a scalar index: an expert's weight, of whose arrays alone it is made."""
        values, scales, zeros, row_scales, columns, _ = self.arrays()
        zeros = None if zeros is None else zeros[:, index]
        row_scales = None if row_scales is None else row_scales[index]
        arrays = QuantArrays(values[index], scales[:, index], zeros, row_scales, columns)
        return dequantise(self.held, arrays, self.dtype).reshape(self.shape[1:])


def hold_quantised(linear: Linear, held: WeightFormat) -> None:
    """Replaces the weight of a linear layer, built under `nnx.eval_shape`."""
    assert isinstance(linear.weight, DenseWeight)
    linear.weight = QuantWeight(linear.weight, linear.out_axes, held)


def dequantise(held: WeightFormat, arrays: QuantArrays, dtype: DTypeLike) -> Float[Array, "*out K"]:
    """The weight, computed in float32."""
    values = elements(held, arrays).astype(jnp.float32)
    columns = values.shape[-1]
    if arrays.zeros is not None:
        values -= _by_column(held, arrays.zeros.astype(jnp.float32), columns)
    elif held.element == INT4:
        values -= 8
    values = (values * _by_column(held, group_scales(held, arrays), columns)).astype(dtype)
    return values if arrays.columns is None else values[..., jnp.argsort(arrays.columns)]


def elements(held: WeightFormat, arrays: QuantArrays) -> Shaped[Array, "*out K"]:
    """4-bit integers as uint8, E2M1 as its values in float32."""
    if held.element not in FOUR_BITS:
        return arrays.values
    codes = unpack_words(arrays.values, held.tile)
    return jnp.array(E2M1_VALUES, jnp.float32)[codes] if held.element == E2M1 else codes


def group_scales(held: WeightFormat, arrays: QuantArrays) -> Float32[Array, "G *out"]:
    """Row scales included."""
    scales = arrays.scales
    if held.scale == E8M0:  # the byte is the exponent of a float32
        scales = lax.bitcast_convert_type(scales.astype(jnp.uint32) << 23, jnp.float32)
    scales = scales.astype(jnp.float32)
    return scales if arrays.row_scales is None else scales * arrays.row_scales


def _by_column(held: WeightFormat, grouped: Array, columns: int) -> Array:
    """[G, *out] -> [*out, K], or [*out, 1] where all columns share one."""
    moved = jnp.moveaxis(grouped, 0, -1)
    if moved.shape[-1] == 1:
        return moved
    return jnp.repeat(moved, held.group, axis=-1)[..., :columns]  # the last group may be short
