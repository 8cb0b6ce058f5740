"""Gate and up in parts, as plain XLA operations."""

from __future__ import annotations

from collections.abc import Callable

import jax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32


def act_and_mul(
    parts: Float32[Array, "S T 2 N"], activation: Callable[[jax.Array], jax.Array], out_dtype: DTypeLike
) -> Float[Array, "T N"]:
    """See `lmdeploy_jax.pallas_kernels.act_and_mul`."""
    both = parts.sum(0).astype(out_dtype)
    return activation(both[:, 0]) * both[:, 1]
