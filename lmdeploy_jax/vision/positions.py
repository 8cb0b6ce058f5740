"""Where patches stand: entries of the position table, rows and columns, places within windows."""

from __future__ import annotations

import math

import numpy as np

from lmdeploy_jax.vision.config import PositionTable
from lmdeploy_jax.vision.interpolate import grid_taps
from lmdeploy_jax.vision.processor import ImageProcessor


def position_taps(
    table: PositionTable, processor: ImageProcessor, rows: int, columns: int
) -> tuple[np.ndarray, np.ndarray]:
    """Entries of a position table and their shares for the patches of a view, int32 and float32 [patches, n].

    n is 1 where the view's grid is the table's own, 2 where it is by axis, else what the interpolation reads.
    """
    if table.by_axis:
        across, down = np.meshgrid(range(columns), range(table.side, table.side + rows))
        taps = np.stack([across, down], axis=-1)
        weights = np.ones(taps.shape)
    elif rows == columns == table.side:
        taps = np.arange(rows * columns).reshape(rows, columns, 1)
        weights = np.ones(taps.shape)
    else:
        taps, weights = grid_taps(
            rows, columns, table.side, table.interpolation, align_corners=table.align_corners
        )
    return processor.listed(taps.astype(np.int32)), processor.listed(weights.astype(np.float32))


def coordinates(processor: ImageProcessor, rows: int, columns: int) -> np.ndarray:
    """Row and column of each patch of a view, int32 [patches, 2]."""
    grid = np.stack(np.meshgrid(range(rows), range(columns), indexing="ij"), axis=-1)
    return processor.listed(grid.astype(np.int32))


def window_places(merge: int, window: int, rows: int, columns: int) -> tuple[np.ndarray, int]:
    """Where the patches of a view stand when it is cut in square windows of `window` patches: int32
    [patches], and the patches of all windows together. Windows over the edge are not full.

    A block of `merge` x `merge` patches stays together.
    """
    side = math.isqrt(window) // merge  # blocks along a window's edge
    block = np.stack(np.meshgrid(range(rows // merge), range(columns // merge), indexing="ij"), axis=-1)
    outer, inner = np.divmod(block.reshape(-1, 2), side)
    across = math.ceil(columns // merge / side)
    number = outer[:, 0] * across + outer[:, 1]
    place = number * side**2 + inner[:, 0] * side + inner[:, 1]
    patches = place[:, None] * merge**2 + np.arange(merge**2)
    return patches.reshape(-1).astype(np.int32), math.ceil(rows // merge / side) * across * window
