"""Products of many rows with their bias and activation."""

from __future__ import annotations

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from lmdeploy_jax.pallas_kernels.fused_dense import xla
from lmdeploy_jax.pallas_kernels.fused_dense.xla import Activation, gelu
from lmdeploy_jax.pallas_kernels.registry import check_backend

__all__ = ["fused_dense", "gelu", "why_not_mosaic"]

OUTPUTS, COLUMNS = 256, 512  # of a tile; that each stage of shared memory is read an even number of times


def why_not_mosaic(rows: int, shape: tuple[int, int], dtype: DTypeLike) -> str | None:
    """Why backend "mosaic" cannot multiply so many rows by a weight of `shape` [N, K], or None."""
    outputs, columns = shape
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"it multiplies 16-bit numbers, not {dtype}"
    if outputs % OUTPUTS or columns % COLUMNS:
        return f"{outputs} outputs of {columns} columns are no whole tiles of {OUTPUTS} by {COLUMNS}"
    return f"{rows} rows are no multiple of 8" if rows % 8 else None


def fused_dense(
    x: Float[Array, "T K"],
    weight: Float[Array, "N K"],
    bias: Float[Array, "N"],
    *,
    activation: Activation,
    backend: str,
) -> Float[Array, "T N"]:
    """`activation(x @ weight^T + bias)`, all in f32 and rounded once, to x's dtype.

    Backend "mosaic" is for Hopper, see `why_not_mosaic`. Raises ValueError for what it cannot do and for an
    unknown backend.
    """
    check_backend(backend, "mosaic")
    if backend != "mosaic":
        return xla.fused_dense(x, weight, bias, activation)
    reason = why_not_mosaic(x.shape[0], (weight.shape[0], weight.shape[1]), x.dtype)
    if reason is not None:
        raise ValueError(f"backend 'mosaic' cannot do this product: {reason}; take 'xla'")
    from lmdeploy_jax.pallas_kernels.fused_dense import mosaic  # CPUs never need it

    return mosaic.fused_dense(x, weight, bias, activation)
