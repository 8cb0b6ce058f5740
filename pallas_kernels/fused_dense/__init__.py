"""Products of many rows with the norm before them, their bias, activation and residual."""

from __future__ import annotations

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from lmdeploy_jax.pallas_kernels.fused_dense import xla
from lmdeploy_jax.pallas_kernels.fused_dense.xla import Activation, RowNorm, gelu
from lmdeploy_jax.pallas_kernels.registry import check_backend

__all__ = ["RowNorm", "fused_dense", "gelu", "in_one_round", "why_not_mosaic"]

OUTPUTS = 64  # stored at a time
COLUMNS = 512  # that each stage of shared memory is read an even number of times


def why_not_mosaic(rows: int, shape: tuple[int, int], dtype: DTypeLike) -> str | None:
    """Why backend "mosaic" cannot multiply so many rows by a weight of `shape` [N, K], or None."""
    outputs, columns = shape
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"it multiplies 16-bit numbers, not {dtype}"
    if outputs % OUTPUTS or columns % COLUMNS:
        return f"{outputs} outputs of {columns} columns are no whole tiles of {OUTPUTS} by {COLUMNS}"
    return f"{rows} rows are no multiple of 8" if rows % 8 else None


def in_one_round(rows: int, outputs: int) -> bool:
    """Whether backend "mosaic" has no more tiles than cores; with several rounds of them XLA is faster."""
    from lmdeploy_jax.pallas_kernels.fused_dense import mosaic

    return mosaic.fitted(rows, outputs).rounds(rows, outputs) == 1


def fused_dense(
    x: Float[Array, "T K"],
    weight: Float[Array, "N K"],
    bias: Float[Array, "N"],
    *,
    activation: Activation | None = None,
    norm: RowNorm | None = None,
    residual: Float[Array, "T N"] | None = None,
    backend: str,
) -> Float[Array, "T N"]:
    """`residual + activation(norm(x) @ weight^T + bias)`, all in f32 and rounded once, to x's dtype.

    A norm's statistics are of the rows as they come; the mean is taken off what the product gives: `norm(x) @
    weight^T` is `(x @ weight^T - mean * column_sums) * scale`, so that x is not rounded again.

    Backend "mosaic" is for Hopper, see `why_not_mosaic`. Raises ValueError for what it cannot do and for an
    unknown backend.
    """
    check_backend(backend, "mosaic")
    if backend != "mosaic":
        return xla.fused_dense(x, weight, bias, activation, norm, residual)
    reason = why_not_mosaic(x.shape[0], (weight.shape[0], weight.shape[1]), x.dtype)
    if reason is not None:
        raise ValueError(f"backend 'mosaic' cannot do this product: {reason}; take 'xla'")
    from lmdeploy_jax.pallas_kernels.fused_dense import mosaic  # CPUs never need it

    return mosaic.fused_dense(x, weight, bias, activation, norm, residual)
