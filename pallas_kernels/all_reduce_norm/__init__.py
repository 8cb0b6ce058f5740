"""A sum over devices, residual addition and RMSNorm (Zhang and Sennrich, 2019) in one pass."""

from __future__ import annotations

from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from lmdeploy_jax.pallas_kernels.all_reduce_norm import xla
from lmdeploy_jax.pallas_kernels.registry import check_backend
from lmdeploy_jax.pallas_kernels.workspace import MOST_ROWS, elements


def all_reduce_add_rms_norm(
    x: Float[Array, "T E"],
    delta: Float[Array, "*S T E"],
    weight: Float[Array, "E"],
    peers: Int32[Array, "1 K"],
    *,
    axis: str | tuple[str, ...],
    eps: float,
    offset: float = 0.0,
    backend: str,
) -> tuple[Float[Array, "T E"], Float[Array, "T E"]]:
    """Adds every device's `delta` to the residual stream x: -> the new x [T, E] and its RMSNorm [T, E].

    To be called inside a `shard_map` over `axis`. x [T, E], alike on all devices; delta [T, E] or parts
    [S, T, E], whose sum on a device is rounded once to x's dtype. All devices have the same bits: sums go by
    rank. `peers`: see `lmdeploy_jax.parallel.peers`; XLA's sum has no use for it. Raises ValueError for
    shapes that do not fit.
    """
    check_backend(backend)
    if delta.shape[-2:] != x.shape or delta.ndim > 3 or weight.shape != x.shape[-1:]:
        raise ValueError(f"x {x.shape}, delta {delta.shape} and weight {weight.shape} do not fit")
    parts = delta if delta.ndim == 3 else delta[None]
    if backend != "pallas":  # no interpreter knows of peers
        return xla.all_reduce_add_rms_norm(x, parts, weight, axis, eps=eps, offset=offset)
    why = why_not(x.shape[0], x.shape[1], x.dtype)
    if why is not None:
        raise ValueError(why)
    from lmdeploy_jax.pallas_kernels.all_reduce_norm import pallas  # CPUs never need it

    return pallas.all_reduce_add_rms_norm(x, parts, weight, peers, eps=eps, offset=offset, interpret=False)


def why_not(rows: int, size: int, dtype: DTypeLike) -> str | None:
    """Why the kernel cannot sum so many rows of that size, or None if it can."""
    least = 32 * elements(dtype)  # of a warp
    if rows > MOST_ROWS:
        return f"{rows} rows are more than the {MOST_ROWS} of a workspace: sum them through XLA"
    if size < least or size % elements(dtype):
        return f"rows of {size} elements are no multiple of {elements(dtype)} from {least} on"
    return None
