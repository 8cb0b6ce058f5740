"""A sum over devices by XLA, then residual addition and RMSNorm."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from lmdeploy_jax.pallas_kernels.norm import xla


def all_reduce_add_rms_norm(
    x: Float[Array, "T E"],
    parts: Float[Array, "S T E"],
    weight: Float[Array, "E"],
    axis: str | tuple[str, ...],
    *,
    eps: float,
    offset: float,
) -> tuple[Float[Array, "T E"], Float[Array, "T E"]]:
    """See `lmdeploy_jax.pallas_kernels.all_reduce_norm`."""
    partial = jnp.sum(parts.astype(jnp.float32), axis=0).astype(x.dtype)
    total = lax.psum(partial.astype(jnp.float32), axis)
    return xla.add_rms_norm(x, total, weight, eps=eps, offset=offset)
