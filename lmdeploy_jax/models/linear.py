"""Weights in HuggingFace's [out, in] order, `out` and `in` each one axis or several."""

from __future__ import annotations

from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

Axes = tuple[str | None, ...]


def param(shape: tuple[int, ...], dtype: DTypeLike, axes: Axes) -> nnx.Param:
    """A parameter with the logical name of each of its axes, which `parallel.rules` maps to the mesh."""
    return nnx.Param(jnp.zeros(shape, dtype), axes=axes)


class Weight(Protocol):
    """What a product reads: one leaf, or an `nnx.Module` of several (values, scales), all with `axes`."""

    @property
    def format(self) -> str:
        """How it is held, as `models.tuning` tells formats apart."""

    @property
    def shape(self) -> tuple[int, ...]:
        """[*out, *inner], whatever is packed in the leaves."""

    def dense(self) -> Float[Array, "..."]:
        """All of it in the dtype of the activations: what XLA's products read."""


class DenseWeight(nnx.Param):
    """A weight in the dtype of the activations, in one leaf."""

    @property
    def format(self) -> str:
        """`w16a16` for bfloat16 and float16 alike."""
        bits = 8 * self.dtype.itemsize
        return f"w{bits}a{bits}"

    def dense(self) -> Float[Array, "..."]:
        return self[...]


class Linear(nnx.Module):
    """A weight [*out, *inner] and perhaps a bias [*out]; `axes` are the weight's."""

    weight: Weight

    def __init__(
        self, out: tuple[int, ...], inner: tuple[int, ...], axes: Axes, *, bias: bool, dtype: jnp.dtype
    ) -> None:
        self.out_axes = len(out)
        self.weight = DenseWeight(jnp.zeros((*out, *inner), dtype), axes=axes)
        self.bias = param(out, dtype, axes[: len(out)]) if bias else None

    def out_shape(self, x: Float[Array, "T *inner"] | jax.ShapeDtypeStruct) -> tuple[int, ...]:
        """[*out] of a product with x, on this device."""
        return self.weight.shape[: len(self.weight.shape) - x.ndim + 1]


def soft_cap(x: Float[Array, "*shape"], cap: float | None) -> Float[Array, "*shape"]:
    """Bounds x smoothly to (-cap, cap); None leaves it alone."""
    return x if cap is None else cap * jnp.tanh(x / cap)
