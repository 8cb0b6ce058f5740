"""Products of a few rows with a large weight: bound by the reading of the weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped

from lmdeploy_jax.pallas_kernels.registry import check_backend
from lmdeploy_jax.pallas_kernels.shapes import Unscaled
from lmdeploy_jax.pallas_kernels.skinny_gemm import xla
from lmdeploy_jax.pallas_kernels.skinny_gemm.tiling import MAX_TOKENS, StreamTiling, Tiling

__all__ = [
    "MAX_TOKENS",
    "StreamTiling",
    "Tiling",
    "check_normed",
    "gated_skinny_gemm",
    "norm_skinny_gemm",
    "skinny_gemm",
    "unscaled_norm_skinny_gemm",
]


def skinny_gemm(
    x: Float[Array, "T K"],
    weight: Float[Array, "N K"],
    tiling: Tiling,
    *,
    bias: Float[Array, "N"] | None = None,
    out_dtype: DTypeLike,
    backend: str,
) -> Float[Array, "{tiling.splits} T N"]:
    """x [T, K] @ weight [N, K]^T in parts: -> [splits, T, N] in `out_dtype`, whose sum over parts it is.

    `bias` is a summand of the first part. T is at most MAX_TOKENS. Accumulates in f32. Raises ValueError for
    shapes that do not fit.
    """
    check_backend(backend)
    _check(x, weight.shape, tiling)
    if backend == "xla":
        return xla.skinny_gemm(x, weight, bias, tiling.splits, out_dtype)
    from lmdeploy_jax.pallas_kernels.skinny_gemm import pallas  # CPUs never need it

    interpret = backend == "pallas_interpret"
    return pallas.skinny_gemm(x, weight, bias, tiling, out_dtype, interpret=interpret)


def gated_skinny_gemm(
    x: Float[Array, "T K"],
    weight: Float[Array, "2 N K"],
    tiling: Tiling | StreamTiling,
    *,
    activation: Callable[[jax.Array], jax.Array],
    backend: str,
) -> Float[Array, "T N"]:
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
        from lmdeploy_jax.pallas_kernels.skinny_gemm import mosaic

        return mosaic.gated_skinny_gemm(x, weight, tiling, activation)
    if tiling.splits != 1:
        raise ValueError(f"splits is {tiling.splits}; a gated product has whole sums only: it must be 1")
    from lmdeploy_jax.pallas_kernels.skinny_gemm import pallas  # CPUs never need it

    return pallas.gated_skinny_gemm(x, weight, tiling, activation, interpret=backend == "pallas_interpret")


def norm_skinny_gemm(
    x: Float[Array, "1 K"],
    delta: Float[Array, "*S 1 K"],
    norm: Float[Array, "K"],
    weight: Float[Array, "*halves N K"],
    tiling: Tiling,
    *,
    activation: Callable[[jax.Array], jax.Array] | None = None,
    eps: float,
    offset: float = 0.0,
    out_dtype: DTypeLike,
    backend: str,
) -> tuple[Float[Array, "1 K"], Float[Array, "1 N"]]:
    """`add_rms_norm` of one row, whose arguments x, delta, norm, eps and offset are, and a product with it.

    -> the new x [1, K], and [1, N] in `out_dtype`: that of the normed x with weight [N, K] or, with an
    `activation`, `gated_skinny_gemm` with weight [2, N, K]. `tiling.splits` is 1. The norm's scale is applied
    to the product; float16 might not hold what is not normed. Raises ValueError for shapes that do not fit.
    """
    check_backend(backend)
    halves = weight[None] if activation is None else weight
    parts = delta if delta.ndim == 3 else delta[None]
    check_normed(x, delta, norm)
    if halves.ndim != 3 or halves.shape[0] != (1 if activation is None else 2) or tiling.splits != 1:
        raise ValueError(
            f"weight {weight.shape} must be [N, K], or [2, N, K] with an activation, and splits, "
            f"{tiling.splits}, 1"
        )
    _check(x, halves.shape[1:], tiling)
    rest: dict[str, Any] = {"eps": eps, "offset": offset, "out_dtype": out_dtype}
    if backend == "xla":
        return xla.norm_skinny_gemm(x, parts, norm, halves, activation, **rest)
    from lmdeploy_jax.pallas_kernels.skinny_gemm import normed  # CPUs never need it

    interpret = backend == "pallas_interpret"
    return normed.norm_skinny_gemm(x, parts, norm, halves, tiling, activation, **rest, interpret=interpret)


def unscaled_norm_skinny_gemm(
    x: Float[Array, "1 K"],
    delta: Float[Array, "*S 1 K"],
    norm: Float[Array, "K"],
    weight: Float[Array, "N K"],
    tiling: Tiling,
    *,
    eps: float,
    offset: float = 0.0,
    backend: str,
) -> tuple[Float[Array, "1 K"], Unscaled]:
    """`norm_skinny_gemm` in `tiling.splits` parts [S, 1, N], whose reader applies the norm's scale.

    So each program reads its share of the row alone. Raises ValueError for shapes that do not fit.
    """
    check_backend(backend)
    parts = delta if delta.ndim == 3 else delta[None]
    check_normed(x, delta, norm)
    _check(x, weight.shape, tiling)
    how: dict[str, Any] = {"eps": eps, "offset": offset}
    if backend == "xla":
        return xla.unscaled_norm_skinny_gemm(x, parts, norm, weight, tiling.splits, **how)
    from lmdeploy_jax.pallas_kernels.skinny_gemm import normed  # CPUs never need it

    how["interpret"] = backend == "pallas_interpret"
    return normed.unscaled_norm_skinny_gemm(x, parts, norm, weight[None], tiling, **how)


def check_normed(x: Shaped[Array, "..."], delta: Shaped[Array, "..."], norm: Shaped[Array, "..."]) -> None:
    """Raises ValueError for what `norm_skinny_gemm` cannot add and norm."""
    if x.shape[0] != 1 or delta.shape[-2:] != x.shape or delta.ndim > 3 or norm.shape != x.shape[1:]:
        raise ValueError(
            f"x {x.shape}, delta {delta.shape} and norm {norm.shape} do not fit: they must be [1, K], [1, K] "
            "or [S, 1, K], and [K]"
        )


def _check(x: jax.Array, weight: tuple[int, ...], tiling: Tiling | StreamTiling) -> None:
    if x.ndim != 2 or len(weight) != 2 or x.shape[1] != weight[1]:
        raise ValueError(f"x {x.shape} and weight {weight} do not fit: they must be [T, K] and [N, K]")
    if not 1 <= x.shape[0] <= MAX_TOKENS:
        raise ValueError(f"x has {x.shape[0]} rows; a skinny product takes 1 to {MAX_TOKENS}")
    tiling.check(tokens=x.shape[0], inner=x.shape[1], outputs=weight[0])
