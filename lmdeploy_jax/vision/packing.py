"""Views side by side in one run of a vision model, as host arrays of fixed sizes.

Views and not images are what a run is made of: a large image may be spread over several runs, so that others
need not wait for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from lmdeploy_jax.vision.config import VisionModelConfig
from lmdeploy_jax.vision.inputs import VisionInputs
from lmdeploy_jax.vision.positions import coordinates, position_taps, window_places
from lmdeploy_jax.vision.processor import View
from lmdeploy_jax.vision.resize import MOST_RATIO, PACKED

PADDING = -1  # the segment of patches that are none


def size_of(config: VisionModelConfig, grid: tuple[int, int]) -> int:
    """What a view takes of the size of a run: 1 where all are squares of one size, else places of patches."""
    return 1 if config.tower.grid is not None else _places(config, *grid)[1]


def most_places(config: VisionModelConfig, tokens: int) -> int | None:
    """What the largest view takes, of those that a prompt of so many tokens can hold: places of patches. None
    where all views are squares of one size.
    """
    processor, rule = config.processor, config.processor.rule
    if config.tower.grid is not None or not isinstance(rule, PACKED):
        return None
    pixels = rule.most_pixels
    if config.video is not None:
        pixels = max(pixels, config.video.most_pixels)
    patches = min(pixels // processor.patch**2, tokens * processor.merge**2)
    if config.tower.window is None:
        return patches
    rows = math.isqrt(patches // MOST_RATIO)  # of the thinnest view, whose windows are the emptiest
    spare = math.isqrt(config.tower.window) - processor.merge
    return patches + spare * (rows + math.ceil(patches / max(rows, 1)) + spare)


def output_of(config: VisionModelConfig, size: int) -> int:
    """Tokens that a run of a size gives at most."""
    patches = size if config.tower.grid is None else size * config.tower.grid**2
    return patches // config.processor.merge**2


def pack(config: VisionModelConfig, views: Sequence[View], size: int, output: int) -> VisionInputs:
    """The inputs of one run, which gives the tokens of the views one after the other, then the learned rows.

    size: of the run, in what `size_of` counts. Long runs of patches are whole blocks of XLA's attention.
    output: tokens of the run's result; those beyond the views' are copies of the first.
    Raises ValueError where the views do not fit.
    """
    needed = sum(size_of(config, view.grid) for view in views)
    block = config.processor.merge**2
    tokens = sum(len(view.patches) for view in views) // block
    if needed > size or tokens > output:
        raise ValueError(f"views of {needed} with {tokens} tokens do not fit a run of {size} with {output}")
    inputs, places = (_packed if config.tower.grid is None else _tiled)(config, views, size)
    merged = inputs.patches.shape[0] * inputs.patches.shape[1] // block
    rest = np.zeros(output - tokens, np.int32)
    wanted = np.concatenate([*places, rest, merged + np.arange(config.learned)])
    return inputs._replace(output=wanted.astype(np.int32))


def result_index(rows: np.ndarray, first: int, output: int) -> np.ndarray:
    """Where an image's rows, as `VisionFamily.rows` names them, stand in the result of a run: int32.

    first: where the tokens of its views begin; output: of the run.
    """
    return np.where(rows < 0, output - 1 - rows, first + rows).astype(np.int32)


Packed = tuple[VisionInputs, list[np.ndarray]]  # and where the merged patches of each view stand


def _tiled(config: VisionModelConfig, views: Sequence[View], size: int) -> Packed:
    """Views one below the other."""
    patches = np.stack([view.patches for view in views])
    count = patches.shape[1] // config.processor.merge**2
    padded = np.zeros((size, *patches.shape[1:]), patches.dtype)
    padded[: len(patches)] = patches
    return VisionInputs(padded, None), [np.arange(len(patches) * count)]


def _packed(config: VisionModelConfig, views: Sequence[View], size: int) -> Packed:
    """Views one after the other, each a segment."""
    inputs, block = _empty(config, views[0], size), config.processor.merge**2
    first, places = 0, []
    for segment, view in enumerate(views):
        within, length = _places(config, *view.grid)
        _put(config, inputs, first + within, segment, view)
        places.append((first + within[::block]) // block)
        first += length
    return inputs, places


def _places(config: VisionModelConfig, rows: int, columns: int) -> tuple[np.ndarray, int]:
    """Where a view's patches stand in a run, and how many places they take."""
    if config.tower.window is None:
        return np.arange(rows * columns), rows * columns
    return window_places(config.processor.merge, config.tower.window, rows, columns)


def _empty(config: VisionModelConfig, view: View, size: int) -> VisionInputs:
    """A run of padding."""
    table, shape = config.tower.positions, (1, size)
    taps = 0 if table is None else table.taps
    return VisionInputs(
        np.zeros((*shape, view.patches.shape[1]), view.patches.dtype),
        None,
        np.full(shape, PADDING, np.int32),
        np.zeros((*shape, 2), np.int32),
        np.zeros((*shape, taps), np.int32) if taps else None,
        np.zeros((*shape, taps), np.float32) if taps else None,
    )


def _put(config: VisionModelConfig, inputs: VisionInputs, at: np.ndarray, segment: int, view: View) -> None:
    """One view's patches at their places."""
    inputs.patches[0, at] = view.patches
    inputs.segments[0, at] = segment  # type: ignore[index]
    inputs.coordinates[0, at] = coordinates(config.processor, *view.grid)  # type: ignore[index]
    if config.tower.positions is not None:
        taps, weights = position_taps(config.tower.positions, config.processor, *view.grid)
        used = taps.shape[1]  # one, where the view has the table's own grid
        inputs.taps[0, at, :used] = taps  # type: ignore[index]
        inputs.weights[0, at, :used] = weights  # type: ignore[index]
