"""Products of a few rows with a large weight of 8 or 4 bits an element: the family of `skinny_gemm`.

Weights of 8 bits are multiplied with activations of 8 bits or, where a tiling says so, of 16; those of 4 bits
with activations of 16. Either is multiplied element by element as it is, exactly, and scaled afterwards: a
group's sum in f32 by the group's scales.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from lmdeploy_jax.pallas_kernels.quant_gemm import xla
from lmdeploy_jax.pallas_kernels.quant_gemm.streaming import why_not_streamed
from lmdeploy_jax.pallas_kernels.quant_gemm.words import PER_WORD, TILE
from lmdeploy_jax.pallas_kernels.registry import check_backend
from lmdeploy_jax.pallas_kernels.round_rows import round_rows
from lmdeploy_jax.pallas_kernels.shapes import Quantised, Unscaled
from lmdeploy_jax.pallas_kernels.skinny_gemm import check_normed
from lmdeploy_jax.pallas_kernels.skinny_gemm.tiling import MAX_TOKENS, StreamTiling, Tiling

__all__ = [
    "gated_quant_gemm",
    "norm_quant_gemm",
    "quant_gemm",
    "streamed_quant_gemm",
    "unscaled_norm_quant_gemm",
    "why_not_quant",
    "why_not_streamed",
]

Rows = Float[Array, "T K"] | Quantised


def quant_gemm(
    x: Rows, weight: Quantised, tiling: Tiling, *, out_dtype: DTypeLike, backend: str
) -> Float[Array, "{tiling.splits} T N"]:
    """x [T, K] @ weight [N, K]^T in parts: -> [splits, T, N] in `out_dtype`, whose sum over parts it is.

    T is at most MAX_TOKENS; x is rounded to as many groups as the weight has, or of 16 bits where the weight
    has 4 or where `tiling.reads_wide`. Accumulates in f32, int8 in int32.
    Raises ValueError for what does not fit.
    """
    check_backend(backend)
    halves = _halves(weight)
    _check(x, halves, tiling)
    if backend == "xla":
        return xla.quant_gemm(_rounded(x, weight, tiling), halves, tiling.splits)[:, 0].astype(out_dtype)
    from lmdeploy_jax.pallas_kernels.quant_gemm import pallas  # CPUs never need it

    return pallas.quant_gemm(x, halves, tiling, out_dtype, interpret=backend == "pallas_interpret")


def gated_quant_gemm(
    x: Rows,
    weight: Quantised,
    tiling: Tiling,
    *,
    activation: Callable[[jax.Array], jax.Array],
    out_dtype: DTypeLike,
    backend: str,
) -> Float[Array, "T N"]:
    """activation(x @ weight[0]^T) * (x @ weight[1]^T): x [T, K], weight [2, N, K] -> [T, N] in `out_dtype`.

    As `quant_gemm`; `tiling.splits` is 1.
    """
    check_backend(backend)
    if weight.values.ndim != 3 or weight.values.shape[0] != 2 or tiling.splits != 1:
        raise ValueError(f"weight {weight.values.shape} must be [2, N, K], and splits, {tiling.splits}, 1")
    _check(x, weight, tiling)
    if backend == "xla":
        gate, up = xla.quant_gemm(_rounded(x, weight, tiling), weight, 1)[0].astype(out_dtype)
        return activation(gate) * up
    from lmdeploy_jax.pallas_kernels.quant_gemm import pallas  # CPUs never need it

    interpret = backend == "pallas_interpret"
    return pallas.quant_gemm(x, weight, tiling, out_dtype, activation, interpret=interpret)[0]


def norm_quant_gemm(
    x: Float[Array, "1 K"],
    delta: Float[Array, "*S 1 K"],
    norm: Float[Array, "K"],
    weight: Quantised,
    tiling: Tiling,
    *,
    activation: Callable[[jax.Array], jax.Array] | None = None,
    eps: float,
    offset: float = 0.0,
    out_dtype: DTypeLike,
    backend: str,
) -> tuple[Float[Array, "1 K"], Float[Array, "1 N"]]:
    """`skinny_gemm.norm_skinny_gemm` with a weight [N, K], or [2, N, K] with an activation.

    A weight of 8 bits asks for a tiling that rounds or widens. Raises ValueError for what does not fit.
    """
    check_backend(backend)
    halves = _halves(weight) if activation is None else weight
    parts = delta if delta.ndim == 3 else delta[None]
    check_normed(x, delta, norm)
    if halves.values.shape[0] != (1 if activation is None else 2) or tiling.splits != 1:
        raise ValueError(
            f"weight {weight.values.shape} must be [N, K], or [2, N, K] with an activation, and splits, "
            f"{tiling.splits}, 1"
        )
    _check(x, halves, tiling)
    how: dict[str, Any] = {"eps": eps, "offset": offset}
    if backend == "xla":
        rounding = (weight.values.dtype, x.shape[1] // tiling.block_in) if tiling.rounds else None
        added, product = xla.norm_quant_gemm(x, parts, norm, halves, rounding, **how)
        product = product.astype(out_dtype)
        return added, product[0] if activation is None else activation(product[0]) * product[1]
    from lmdeploy_jax.pallas_kernels.quant_gemm import normed  # CPUs never need it

    how |= {"out_dtype": out_dtype, "interpret": backend == "pallas_interpret"}
    return normed.norm_quant_gemm(x, parts, norm, halves, tiling, activation, **how)


def unscaled_norm_quant_gemm(
    x: Float[Array, "1 K"],
    delta: Float[Array, "*S 1 K"],
    norm: Float[Array, "K"],
    weight: Quantised,
    tiling: Tiling,
    *,
    eps: float,
    offset: float = 0.0,
    backend: str,
) -> tuple[Float[Array, "1 K"], Unscaled]:
    """`skinny_gemm.unscaled_norm_skinny_gemm` with a weight [N, K].

    A weight of 8 bits asks for a tiling that rounds or widens. Raises ValueError for what does not fit.
    """
    check_backend(backend)
    halves, parts = _halves(weight), delta if delta.ndim == 3 else delta[None]
    check_normed(x, delta, norm)
    _check(x, halves, tiling)
    how: dict[str, Any] = {"eps": eps, "offset": offset}
    if backend == "xla":
        columns = x.shape[1] // tiling.block_in if tiling.rounds else None
        return xla.unscaled_norm_quant_gemm(x, parts, norm, halves, tiling.splits, columns, **how)
    from lmdeploy_jax.pallas_kernels.quant_gemm import normed  # CPUs never need it

    how["interpret"] = backend == "pallas_interpret"
    return normed.unscaled_norm_quant_gemm(x, parts, norm, halves, tiling, **how)


def streamed_quant_gemm(
    x: Rows, weight: Quantised, tiling: StreamTiling, *, out_dtype: DTypeLike, backend: str
) -> Float[Array, "{tiling.splits} T N"]:
    """`quant_gemm` on Hopper's own instructions, for many rows too, if a multiple of 8.

    Raises ValueError for what does not fit, see `why_not_streamed`.
    """
    check_backend(backend)
    rows = _check_rows(x, weight)
    fault = why_not_streamed(rows.shape[0], weight, tiling.splits)
    if fault is not None:
        raise ValueError(f"{fault}; leave this product to XLA")
    if backend == "xla":
        return xla.quant_gemm(x, _halves(weight), tiling.splits)[:, 0].astype(out_dtype)
    from lmdeploy_jax.pallas_kernels.quant_gemm import mosaic  # CPUs never need it

    return mosaic.quant_gemm(x, weight, tiling, out_dtype, interpret=backend == "pallas_interpret")


def why_not_quant(weight: Quantised, tiling: Tiling | None = None) -> str | None:
    """Why the kernels cannot multiply with a weight [..., N, K], cut so, or None if they can."""
    columns, groups = _columns(weight), weight.scales.shape[0]
    words = weight.values.dtype == jnp.uint16
    if columns % groups:
        return f"{columns} columns are not {groups} groups of one size"
    width = columns // groups
    if words and (columns % TILE or (groups > 1 and TILE % width and width % TILE) or width % (TILE // 4)):
        return f"4-bit weights need groups that fit {TILE} columns; there are {groups} of {width}"
    if not words and weight.zeros is not None:
        return "weights of 8 bits have no zero points here"
    block = None if tiling is None else tiling.block_in
    if block is not None and (block % TILE if words else groups > 1 and width % block):
        return f"blocks of {block} columns do not fit groups of {width}"
    return None


def _columns(weight: Quantised) -> int:
    return weight.values.shape[-1] * (PER_WORD if weight.values.dtype == jnp.uint16 else 1)


def _halves(weight: Quantised) -> Quantised:
    """A weight [N, K] as [1, N, K]."""
    zeros = None if weight.zeros is None else weight.zeros[:, None]
    return Quantised(weight.values[None], weight.scales[:, None], zeros)


def _check(x: Rows, weight: Quantised, tiling: Tiling) -> None:
    rows = _check_rows(x, weight, tiling=tiling)
    if not 1 <= rows.shape[0] <= MAX_TOKENS:
        raise ValueError(f"x has {rows.shape[0]} rows; a skinny product takes 1 to {MAX_TOKENS}")
    tiling.check(tokens=rows.shape[0], inner=rows.shape[1], outputs=weight.values.shape[1])
    fault = why_not_quant(weight, tiling)
    if fault is not None:
        raise ValueError(fault)


def _check_rows(x: Rows, weight: Quantised, *, tiling: Tiling | None = None) -> jax.Array:
    """The values of x, which fit the weight."""
    rows, groups = (x.values, x.scales.shape[0]) if isinstance(x, Quantised) else (x, None)
    columns, words = _columns(weight), weight.values.dtype == jnp.uint16
    if rows.ndim != 2 or rows.shape[1] != columns:
        raise ValueError(f"x {rows.shape} does not fit {columns} columns of a weight: it must be [T, K]")
    wide = tiling is not None and tiling.reads_wide
    if tiling is not None and (tiling.rounds + tiling.widens) > (0 if words else 1):
        raise ValueError(f"{tiling}: only weights of 8 bits are widened or have x rounded, and not both")
    wanted = None if words or wide else weight.scales.shape[0]
    if groups != wanted or (groups is not None and rows.dtype != weight.values.dtype):
        raise ValueError(
            f"x is {rows.dtype} with {groups} groups of columns; a weight of {weight.values.dtype} asks for "
            + ("16 bits" if wanted is None else f"{weight.values.dtype} with {wanted}")
        )
    return rows


def _rounded(x: Rows, weight: Quantised, tiling: Tiling) -> Rows:
    """What the kernel multiplies with where it rounds x itself."""
    if not tiling.rounds:
        return x
    assert not isinstance(x, Quantised)
    return round_rows(x, weight.values.dtype, groups=x.shape[1] // tiling.block_in)
