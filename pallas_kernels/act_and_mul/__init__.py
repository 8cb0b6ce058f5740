"""What follows gate and up where they come in parts: sums, the activation, one times the other."""

from __future__ import annotations

from collections.abc import Callable

import jax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from lmdeploy_jax.pallas_kernels.act_and_mul import xla
from lmdeploy_jax.pallas_kernels.registry import check_backend

__all__ = ["act_and_mul"]


def act_and_mul(
    parts: Float32[Array, "S T 2 N"],
    *,
    activation: Callable[[jax.Array], jax.Array],
    out_dtype: DTypeLike,
    backend: str,
) -> Float[Array, "T N"]:
    """activation(gate) * up in `out_dtype`, to which gate and up, the sums over parts, are rounded first."""
    check_backend(backend)
    if backend == "xla":
        return xla.act_and_mul(parts, activation, out_dtype)
    from lmdeploy_jax.pallas_kernels.act_and_mul import pallas  # CPUs never need it

    return pallas.act_and_mul(parts, activation, out_dtype, interpret=backend == "pallas_interpret")
