"""Interpolation as PyTorch's `F.interpolate` does it, as gathered taps and weights in NumPy.

Its bicubic kernel has a = -0.75 and no filter against aliasing; those of Pillow and `jax.image.resize` have
a = -0.5, so that neither gives these values.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

Interpolation = Literal["bilinear", "bicubic"]
SHARPNESS = -0.75  # of the bicubic kernel, often called a


def axis_taps(
    count: int, side: int, kind: Interpolation, *, align_corners: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Where `count` points over an axis of `side` values lie: indices [count, 2 or 4] and their weights."""
    index = np.arange(count, dtype=np.float32)
    if align_corners:
        at = index * np.float32(side - 1) / np.float32(max(count - 1, 1))
    else:
        at = (index + np.float32(0.5)) * np.float32(side) / np.float32(count) - np.float32(0.5)
    floor = np.floor(at)
    offsets = np.arange(0, 2) if kind == "bilinear" else np.arange(-1, 3)
    distance = np.abs((at - floor)[:, None] - offsets.astype(np.float32))
    taps = np.clip(floor.astype(np.int64)[:, None] + offsets, 0, side - 1)
    return taps, _linear(distance) if kind == "bilinear" else _cubic(distance)


def _linear(distance: np.ndarray) -> np.ndarray:
    return np.clip(1 - distance, 0, None)


def _cubic(distance: np.ndarray) -> np.ndarray:
    a = np.float32(SHARPNESS)
    near = ((a + 2) * distance - (a + 3)) * distance * distance + 1
    far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
    return np.where(distance <= 1, near, far)


def grid_taps(
    rows: int, columns: int, side: int, kind: Interpolation, *, align_corners: bool
) -> tuple[np.ndarray, np.ndarray]:
    """A grid of points over a square table of `side` x `side` entries: each point's entries and weights,
    [rows, columns, 4 or 16] each.
    """
    row_taps, row_weights = axis_taps(rows, side, kind, align_corners=align_corners)
    column_taps, column_weights = axis_taps(columns, side, kind, align_corners=align_corners)
    taps = row_taps[:, None, :, None] * side + column_taps[None, :, None, :]
    weights = row_weights[:, None, :, None] * column_weights[None, :, None, :]
    return taps.reshape(rows, columns, -1), weights.reshape(rows, columns, -1)


def resample_bicubic(values: np.ndarray, height: int, width: int) -> np.ndarray:
    """values [H, W, C] -> float32 [height, width, C], neither rounded nor clipped."""
    values = values.astype(np.float32)
    taps, weights = axis_taps(height, values.shape[0], "bicubic", align_corners=False)
    values = np.einsum("hnwc,hn->hwc", values[taps], weights)
    taps, weights = axis_taps(width, values.shape[1], "bicubic", align_corners=False)
    return np.einsum("hwnc,wn->hwc", values[:, taps], weights)
