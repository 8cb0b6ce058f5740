"""Matrix products with weights in HuggingFace's [out, in] order, `out` and `in` each one axis or several."""

from __future__ import annotations

from functools import partial
from math import prod

import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jax.typing import DTypeLike

Axes = tuple[str | None, ...]

FEW_ROWS = range(2, 65)  # see `few_rows`


def param(shape: tuple[int, ...], dtype: jnp.dtype, axes: Axes) -> nnx.Param:
    """A weight with the logical name of each of its axes, which `parallel.rules` maps to the mesh."""
    return nnx.Param(jnp.zeros(shape, dtype), axes=axes)


def product(
    x: Array, weight: Array, bias: Array | None = None, *, out_dtype: DTypeLike | None = None
) -> Array:
    """x [T, *in], weight [*out, *in], bias [*out] -> [T, *out], in x's dtype or `out_dtype`.

    As one product of matrices: on CPUs, XLA copies a weight of more axes before it multiplies. float32 stays
    float32 on GPUs, whose default would be TF32.
    """
    tokens, out_shape = x.shape[0], weight.shape[: weight.ndim - x.ndim + 1]
    rows, columns = x.reshape(tokens, -1), weight.reshape(prod(out_shape), -1)
    dot = partial(_dot, contracted=(1, 1), out_dtype=out_dtype)
    if few_rows(x):
        flat = lax.platform_dependent(
            rows, columns, cpu=lambda x, weight: turned_product(x.T, weight).T, default=dot
        )
    else:
        flat = dot(rows, columns)
    out = flat.reshape(tokens, *out_shape)
    return out if bias is None else out + bias


def few_rows(x: Array) -> bool:
    """Whether a CPU should take x [T, K] as the right side of its products."""
    return x.dtype == jnp.float32 and x.shape[0] in FEW_ROWS


def turned_product(x: Array, weight: Array) -> Array:
    """x [K, T], weight [N, K] -> [N, T].

    XLA's CPU products first copy their right side into another order, so it had better be the small one. The
    barriers keep XLA from exchanging the sides again.
    """
    return lax.optimization_barrier(_dot(weight, lax.optimization_barrier(x), contracted=(1, 0)))


def _dot(x: Array, y: Array, *, contracted: tuple[int, int], out_dtype: DTypeLike | None = None) -> Array:
    left, right = contracted
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    axes = (((left,), (right,)), ((), ()))
    return lax.dot_general(x, y, axes, precision=precision, preferred_element_type=out_dtype)


class Linear(nnx.Module):
    """A weight [*out, *inner] and perhaps a bias [*out]; `axes` are the weight's."""

    def __init__(
        self, out: tuple[int, ...], inner: tuple[int, ...], axes: Axes, *, bias: bool, dtype: jnp.dtype
    ) -> None:
        self.weight = param((*out, *inner), dtype, axes)
        self.bias = param(out, dtype, axes[: len(out)]) if bias else None

    def __call__(self, x: Array) -> Array:
        """x [T, *inner] -> [T, *out]."""
        return product(x, self.weight[...], None if self.bias is None else self.bias[...])


def soft_cap(x: Array, cap: float | None) -> Array:
    """Bounds x smoothly to (-cap, cap); None leaves it alone."""
    return x if cap is None else cap * jnp.tanh(x / cap)
