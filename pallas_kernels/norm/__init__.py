"""Residual addition and RMSNorm (Zhang and Sennrich, 2019) in one pass."""

from __future__ import annotations

from jaxtyping import Array, Float

from lmdeploy_jax.pallas_kernels.norm import xla
from lmdeploy_jax.pallas_kernels.norm.xla import rms_norm
from lmdeploy_jax.pallas_kernels.registry import check_backend

__all__ = ["add_rms_norm", "rms_norm"]


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
    if delta.shape[-2:] != x.shape or delta.ndim > 3 or weight.shape != x.shape[-1:]:
        raise ValueError(
            f"x {x.shape}, delta {delta.shape} and weight {weight.shape} do not fit: they must be [T, E], "
            "[T, E] or [S, T, E], and [E]"
        )
    if backend == "xla":
        return xla.add_rms_norm(x, delta, weight, eps=eps, offset=offset)
    from lmdeploy_jax.pallas_kernels.norm import pallas  # CPUs never need it

    parts = delta if delta.ndim == 3 else delta[None]
    return pallas.add_rms_norm(
        x, parts, weight, eps=eps, offset=offset, interpret=backend == "pallas_interpret"
    )
