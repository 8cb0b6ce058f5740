"""Products of a few rows with a large weight: bound by the reading of the weight."""

from __future__ import annotations

from collections.abc import Callable

import jax
from jax.typing import DTypeLike

from pallas_kernels.registry import check_backend
from pallas_kernels.skinny_gemm import xla
from pallas_kernels.skinny_gemm.tiling import MAX_TOKENS, StreamTiling, Tiling

__all__ = ["MAX_TOKENS", "StreamTiling", "Tiling", "gated_skinny_gemm", "skinny_gemm"]


def skinny_gemm(
    x: jax.Array, weight: jax.Array, tiling: Tiling, *, out_dtype: DTypeLike, backend: str
) -> jax.Array:
    """x [T, K] @ weight [N, K]^T in parts: -> [splits, T, N] in `out_dtype`, whose sum over parts it is.

    T is at most MAX_TOKENS. Accumulates in f32. Raises ValueError for shapes that do not fit.
    """
    check_backend(backend)
    _check(x, weight.shape, tiling)
    if backend == "xla":
        return xla.skinny_gemm(x, weight, tiling.splits, out_dtype)
    from pallas_kernels.skinny_gemm import pallas  # a CPU does without the import's time

    return pallas.skinny_gemm(x, weight, tiling, out_dtype, interpret=backend == "pallas_interpret")


def gated_skinny_gemm(
    x: jax.Array,
    weight: jax.Array,
    tiling: Tiling | StreamTiling,
    *,
    activation: Callable[[jax.Array], jax.Array],
    backend: str,
) -> jax.Array:
    """activation(x @ weight[0]^T) * (x @ weight[1]^T): x [T, K], weight [2, N, K] -> [T, N] in x's dtype.

    T is at most MAX_TOKENS, and `tiling.splits` is 1. A StreamTiling asks for Hopper and 16 bits, and for
    numbers of rows that 8 divides. Raises ValueError for shapes that do not fit.
    """
    check_backend(backend)
    if weight.ndim != 3 or weight.shape[0] != 2:
        raise ValueError(f"weight {weight.shape} must be [2, N, K]")
    _check(x, weight.shape[1:], tiling)
    if backend == "xla":
        return xla.gated_skinny_gemm(x, weight, activation)
    if isinstance(tiling, StreamTiling):
        from pallas_kernels.skinny_gemm import mosaic

        return mosaic.gated_skinny_gemm(x, weight, tiling, activation)
    if tiling.splits != 1:
        raise ValueError(f"splits is {tiling.splits}; a gated product has whole sums only: it must be 1")
    from pallas_kernels.skinny_gemm import pallas  # a CPU does without the import's time

    return pallas.gated_skinny_gemm(x, weight, tiling, activation, interpret=backend == "pallas_interpret")


def _check(x: jax.Array, weight: tuple[int, ...], tiling: Tiling | StreamTiling) -> None:
    if x.ndim != 2 or len(weight) != 2 or x.shape[1] != weight[1]:
        raise ValueError(f"x {x.shape} and weight {weight} do not fit: they must be [T, K] and [N, K]")
    if not 1 <= x.shape[0] <= MAX_TOKENS:
        raise ValueError(f"x has {x.shape[0]} rows; a skinny product takes 1 to {MAX_TOKENS}")
    tiling.check(tokens=x.shape[0], inner=x.shape[1], outputs=weight[0])
