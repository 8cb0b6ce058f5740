"""Matrix products with weights in HuggingFace's [out, in] order, `out` and `in` each one axis or several."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jax import Array, lax


def param(shape: tuple[int, ...], dtype: jnp.dtype, axes: tuple[str | None, ...]) -> nnx.Param:
    """A weight with the logical name of each of its axes, which `parallel.rules` maps to the mesh."""
    return nnx.Param(jnp.zeros(shape, dtype), axes=axes)


def product(spec: str, x: Array, weight: Array) -> Array:
    """einsum. float32 stays float32 on GPUs, whose default would be TF32."""
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.einsum(spec, x, weight, precision=precision)


class Linear(nnx.Module):
    """`einsum(spec, x, weight) + bias`; the bias has the weight's axes named in `bias_axes`."""

    def __init__(
        self,
        spec: str,
        shape: tuple[int, ...],
        axes: tuple[str | None, ...],
        *,
        dtype: jnp.dtype,
        bias_dims: tuple[int, ...] = (),
    ) -> None:
        self.spec = spec
        self.weight = param(shape, dtype, axes)
        bias_shape, bias_axes = tuple(shape[d] for d in bias_dims), tuple(axes[d] for d in bias_dims)
        self.bias = param(bias_shape, dtype, bias_axes) if bias_dims else None

    def __call__(self, x: Array) -> Array:
        out = product(self.spec, x, self.weight[...])
        return out if self.bias is None else out + self.bias[...]


def soft_cap(x: Array, cap: float | None) -> Array:
    """Bounds x smoothly to (-cap, cap); None leaves it alone."""
    return x if cap is None else cap * jnp.tanh(x / cap)
