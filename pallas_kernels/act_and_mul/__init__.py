"""What follows gate and up where they come in parts: sums, the activation, one times the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Shaped

from lmdeploy_jax.pallas_kernels.act_and_mul import xla
from lmdeploy_jax.pallas_kernels.registry import check_backend
from lmdeploy_jax.pallas_kernels.round_rows import check_groups
from lmdeploy_jax.pallas_kernels.shapes import Quantised

__all__ = ["act_and_mul", "act_and_mul_quant"]


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


def act_and_mul_quant(
    sums: Shaped[Array, "S T 2 N"],
    dtype: DTypeLike,
    *,
    row_scales: Float32[Array, "T"] | None = None,
    scales: Float32[Array, "2 N"] | None = None,
    groups: int = 1,
    scale: Float32[Array, "1"] | None = None,
    activation: Callable[[jax.Array], jax.Array],
    out_dtype: DTypeLike,
    backend: str,
) -> Quantised:
    """`round_rows` of `act_and_mul`, to which sums of 8-bit products may come without their scales.

    sums: of any dtype; what they lack is a scale for each row and one for each output, or nothing.
    Raises ValueError for groups that do not fit.
    """
    check_backend(backend)
    check_groups(sums.shape[3], groups)
    how: dict[str, Any] = {"row_scales": row_scales, "scales": scales, "groups": groups, "scale": scale}
    if backend == "xla":
        return xla.act_and_mul_quant(sums, dtype, activation, out_dtype, **how)
    from lmdeploy_jax.pallas_kernels.act_and_mul import pallas  # CPUs never need it

    interpret = backend == "pallas_interpret"
    return pallas.act_and_mul_quant(sums, dtype, activation, out_dtype, **how, interpret=interpret)
