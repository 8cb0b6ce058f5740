"""Rounding of rows as plain XLA operations."""

from __future__ import annotations

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from lmdeploy_jax.pallas_kernels.shapes import Quantised

LEAST = 1e-7  # of a group's largest element, so that one of zeros has a scale


def round_rows(
    x: Float[Array, "T K"], dtype: DTypeLike, groups: int, scale: Float32[Array, "1"] | None = None
) -> Quantised:
    """See `lmdeploy_jax.pallas_kernels.round_rows`."""
    largest = limit(dtype)
    wide = x.astype(jnp.float32).reshape(x.shape[0], groups, -1)
    scales = (
        jnp.maximum(jnp.abs(wide).max(-1), LEAST) / largest
        if scale is None
        else jnp.broadcast_to(scale, wide.shape[:2])
    )
    scaled = jnp.clip(wide / scales[..., None], -largest, largest)
    values = jnp.round(scaled) if jnp.dtype(dtype) == jnp.int8 else scaled
    return Quantised(values.reshape(x.shape).astype(dtype), scales.T)


def limit(dtype: DTypeLike) -> float:
    """The largest element."""
    return 127.0 if jnp.dtype(dtype) == jnp.int8 else float(jnp.finfo(dtype).max)
