"""Rounding weights to the nearest: integers in groups of columns with zero points, 8 bits by row."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float32, Shaped

LEAST_RANGE = 1e-5  # of a group's weights, so that one of zeros has a scale
LEAST_ROW = 1e-7  # of a row's largest weight, likewise
INT4_MOST = 15


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rounded:
    """A weight of N rows and K columns: what a file has of it."""

    codes: Shaped[Array, "N K"]
    """Unsigned integers where there are zero points; else int8 or FP8."""
    scales: Float32[Array, "N G"]
    """As the file has them, whatever their dtype there."""
    zeros: Float32[Array, "N G"] | None = None

    @jax.jit
    def dense(self) -> Float32[Array, "N K"]:
        """The weight that they stand for."""
        rows, columns = self.codes.shape
        grouped = self.codes.astype(jnp.float32).reshape(rows, self.scales.shape[1], -1)
        grouped = grouped if self.zeros is None else grouped - self.zeros[..., None]
        return (grouped * self.scales[..., None]).reshape(rows, columns)


@dataclass(frozen=True)
class Grid:
    """Where the values of a group of 4-bit weights may lie."""

    group: int
    symmetric: bool = False

    def fit(self, grouped: Float32[Array, "N G g"]) -> tuple[Float32[Array, "N G"], Float32[Array, "N G"]]:
        """Scales and zero points. 0 is on the grid, so that no zero point leaves its four bits; scales are
        what float16 holds, as which they are stored.
        """
        low, high = jnp.minimum(grouped.min(-1), 0), jnp.maximum(grouped.max(-1), 0)
        reach = 2 * jnp.maximum(high, -low) if self.symmetric else high - low
        scales = _float16(jnp.maximum(reach, LEAST_RANGE) / INT4_MOST)
        if self.symmetric:
            return scales, jnp.full_like(scales, (INT4_MOST + 1) // 2)
        return scales, jnp.clip(jnp.round(-low / scales), 0, INT4_MOST)

    def grouped(self, weight: Float32[Array, "N K"]) -> Float32[Array, "N G g"]:
        return weight.reshape(len(weight), -1, self.group)


def nearest(values: Array, scales: Array, zeros: Array) -> Array:
    """The codes, in float32, of values that share each scale and zero point as broadcasting has it."""
    return jnp.clip(jnp.round(values / scales) + zeros, 0, INT4_MOST)


@partial(jax.jit, static_argnums=1)
def round_groups(weight: Float32[Array, "N K"], grid: Grid) -> Rounded:
    """To 4 bits."""
    grouped = grid.grouped(weight)
    scales, zeros = grid.fit(grouped)
    codes = nearest(grouped, scales[..., None], zeros[..., None]).astype(jnp.uint8)
    return Rounded(codes.reshape(weight.shape), scales, zeros)


@partial(jax.jit, static_argnums=(1, 2))
def round_rows(weight: Float32[Array, "N K"], dtype: DTypeLike, scale_dtype: DTypeLike) -> Rounded:
    """To int8 or FP8, with a scale a row that `scale_dtype` holds."""
    floats = jnp.issubdtype(dtype, jnp.floating)
    most = float(jnp.finfo(dtype).max) if floats else float(jnp.iinfo(dtype).max)
    reach = jnp.maximum(jnp.abs(weight).max(1, keepdims=True), LEAST_ROW)
    scales = (reach / most).astype(scale_dtype).astype(jnp.float32)
    scaled = jnp.clip(weight / scales, -most, most)
    return Rounded((scaled if floats else jnp.round(scaled)).astype(dtype), scales)


def _float16(scales: Array) -> Array:
    """Rounded to what float16 holds, and never to 0."""
    least = float(jnp.finfo(jnp.float16).tiny)
    return jnp.maximum(scales, least).astype(jnp.float16).astype(jnp.float32)
