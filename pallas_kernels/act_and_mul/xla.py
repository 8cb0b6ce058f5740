"""Gate and up in parts, as plain XLA operations."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Shaped

from lmdeploy_jax.pallas_kernels.round_rows.xla import round_rows
from lmdeploy_jax.pallas_kernels.shapes import Quantised


def act_and_mul(
    parts: Float32[Array, "S T 2 N"], activation: Callable[[jax.Array], jax.Array], out_dtype: DTypeLike
) -> Float[Array, "T N"]:
    """See `lmdeploy_jax.pallas_kernels.act_and_mul`."""
    both = parts.sum(0).astype(out_dtype)
    return activation(both[:, 0]) * both[:, 1]


def act_and_mul_quant(
    sums: Shaped[Array, "S T 2 N"],
    dtype: DTypeLike,
    activation: Callable[[jax.Array], jax.Array],
    out_dtype: DTypeLike,
    *,
    row_scales: Float32[Array, "T"] | None,
    scales: Float32[Array, "2 N"] | None,
    groups: int,
    scale: Float32[Array, "1"] | None,
) -> Quantised:
    """See `lmdeploy_jax.pallas_kernels.act_and_mul`."""
    total = sums.astype(jnp.float32).sum(0)
    if row_scales is not None and scales is not None:
        total = total * (row_scales[:, None, None] * scales)
    return round_rows(act_and_mul(total[None], activation, out_dtype), dtype, groups, scale)
