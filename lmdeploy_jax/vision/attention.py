"""What turns queries and keys by where their patches are."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from lmdeploy_jax.vision.config import RotaryConfig


def rotation(config: RotaryConfig, head_dim: int, coordinates: Array) -> tuple[Array, Array]:
    """Cosines and sines f32 [B, N, head_dim / 2], or [B, N, 2, head_dim / 4] of halves, of patches at int32
    [B, N, 2] (row, column).
    """
    quarter = head_dim // 4
    index = jnp.arange(quarter, dtype=jnp.float32)
    if config.kind == "alternating":
        rows, columns = 4 * index / head_dim, (4 * index + 2) / head_dim
    else:
        rows = columns = 2 * index / (head_dim // 2)
    frequencies = config.theta ** -jnp.stack([rows, columns])  # [2, head_dim / 4]
    angles = coordinates[..., None].astype(jnp.float32) * frequencies
    if config.kind == "halves":
        angles = angles[..., ::-1, :]
    else:
        angles = angles.reshape(*coordinates.shape[:-1], 2 * quarter)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Array, turn: tuple[Array, Array]) -> Array:
    """x [B, N, H, D] turned in float32: element i with element i + D / 2, or within each half."""
    cos, sin = (part[:, :, None] for part in turn)
    parts = x.reshape(*x.shape[:3], *cos.shape[3:-1], -1).astype(jnp.float32)
    first, second = jnp.split(parts, 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)
