"""Residual addition and RMSNorm (Zhang and Sennrich, 2019) in one pass."""

from __future__ import annotations

import jax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from lmdeploy_jax.pallas_kernels.norm import xla
from lmdeploy_jax.pallas_kernels.norm.xla import rms_norm
from lmdeploy_jax.pallas_kernels.registry import check_backend
from lmdeploy_jax.pallas_kernels.round_rows import check_groups, round_rows
from lmdeploy_jax.pallas_kernels.shapes import Quantised

__all__ = ["add_rms_norm", "add_rms_norm_quant", "rms_norm"]


def add_rms_norm(
    x: Float[Array, "T E"],
    delta: Float[Array, "*S T E"],
    weight: Float[Array, "E"],
    *,
    eps: float,
    offset: float = 0.0,
    backend: str,
) -> tuple[Float[Array, "T E"], Float[Array, "T E"]]:
    """Adds `delta` to the residual stream x, rounded once: -> the new x [T, E] and its RMSNorm [T, E].

    x [T, E]; delta [T, E], or [S, T, E] in f32: parts whose sum is meant (a matrix product cut along its
    inner axis). `offset` is added to the weight [E]. Raises ValueError for shapes that do not fit.
    """
    check_backend(backend)
    _check(x, delta, weight)
    if backend == "xla":
        return xla.add_rms_norm(x, delta, weight, eps=eps, offset=offset)
    from lmdeploy_jax.pallas_kernels.norm import pallas  # CPUs never need it

    parts = delta if delta.ndim == 3 else delta[None]
    return pallas.add_rms_norm(
        x, parts, weight, eps=eps, offset=offset, interpret=backend == "pallas_interpret"
    )


def add_rms_norm_quant(
    x: Float[Array, "T E"],
    delta: Float[Array, "*S T E"],
    weight: Float[Array, "E"],
    dtype: DTypeLike,
    *,
    groups: int = 1,
    scale: Float32[Array, "1"] | None = None,
    eps: float,
    offset: float = 0.0,
    backend: str,
) -> tuple[Float[Array, "T E"], Quantised]:
    """`add_rms_norm`, and `round_rows` of what is normed, to `dtype` in `groups`, in one kernel."""
    check_backend(backend)
    _check(x, delta, weight)
    check_groups(x.shape[1], groups)
    if backend == "xla":
        x, normed = xla.add_rms_norm(x, delta, weight, eps=eps, offset=offset)
        return x, round_rows(normed, dtype, groups=groups, scale=scale)
    from lmdeploy_jax.pallas_kernels.norm import pallas  # CPUs never need it

    parts = delta if delta.ndim == 3 else delta[None]
    options = {"eps": eps, "offset": offset}
    interpret = backend == "pallas_interpret"
    return pallas.add_rms_norm_quant(x, parts, weight, dtype, groups, scale, **options, interpret=interpret)


def _check(x: jax.Array, delta: jax.Array, weight: jax.Array) -> None:
    if delta.shape[-2:] != x.shape or delta.ndim > 3 or weight.shape != x.shape[-1:]:
        raise ValueError(
            f"x {x.shape}, delta {delta.shape} and weight {weight.shape} do not fit: they must be [T, E], "
            "[T, E] or [S, T, E], and [E]"
        )
