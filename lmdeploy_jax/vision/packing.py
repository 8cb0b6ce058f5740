"""Pictures side by side in one run of a vision model: host arrays of fixed sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from lmdeploy_jax.vision.config import VisionModelConfig
from lmdeploy_jax.vision.inputs import VisionInputs
from lmdeploy_jax.vision.positions import coordinates, position_taps, window_places
from lmdeploy_jax.vision.processor import ProcessedImage
from lmdeploy_jax.vision.resize import ImagePlan

ImageRows = Callable[[VisionModelConfig, ImagePlan], np.ndarray]
"""Which rows of the projector an image gives, int32: its merged patches by number, view by view; learned rows
are -1, -2 and so on."""
PADDING = -1  # the segment of patches that are none


def size_of(config: VisionModelConfig, plan: ImagePlan) -> int:
    """What an image takes of the size of a run: views where all are squares of one size, else patches."""
    if config.tower.grid is not None:
        return plan.views
    return plan.views * _places(config, *config.processor.grid(plan))[1]


def pack(
    config: VisionModelConfig, rows: ImageRows, images: Sequence[ProcessedImage], size: int, output: int
) -> VisionInputs:
    """The inputs of one run for several images, whose rows follow each other in the output.

    size: of the run, in what `size_of` counts. Long runs of patches are multiples of `attention.DENSE`.
    output: rows of the run's result; those beyond the images' are copies of the first.
    Raises ValueError where the images do not fit.
    """
    needed = sum(size_of(config, image.plan) for image in images)
    own = [rows(config, image.plan) for image in images]
    if needed > size or sum(map(len, own)) > output:
        raise ValueError(f"images of {needed} with {sum(map(len, own))} rows do not fit {size} with {output}")
    inputs, places = (_tiled if config.tower.grid is not None else _packed)(config, images, size)
    count = inputs.patches.shape[0] * inputs.patches.shape[1] // config.processor.merge**2
    wanted = [np.where(row < 0, count - 1 - row, at[row]) for row, at in zip(own, places, strict=True)]
    filled = np.concatenate([*wanted, np.zeros(output - sum(map(len, own)), np.int32)])
    return inputs._replace(output=filled.astype(np.int32))


Packed = tuple[VisionInputs, list[np.ndarray]]  # and where each image's merged patches stand


def _tiled(config: VisionModelConfig, images: Sequence[ProcessedImage], size: int) -> Packed:
    """Views one below the other."""
    patches = np.concatenate([image.patches for image in images])
    count = patches.shape[1] // config.processor.merge**2
    padded = np.zeros((size, *patches.shape[1:]), patches.dtype)
    padded[: len(patches)] = patches
    ends = np.cumsum([len(image.patches) * count for image in images])
    places = np.split(np.arange(ends[-1]), ends[:-1])
    return VisionInputs(padded, None), places


def _packed(config: VisionModelConfig, images: Sequence[ProcessedImage], size: int) -> Packed:
    """Views one after the other, each a segment."""
    inputs, block = _empty(config, images[0], size), config.processor.merge**2
    first, segment, places = 0, 0, []
    for image in images:
        within, length = _places(config, *image.grid)
        own = []
        for view in image.patches:
            _put(config, inputs, first + within, segment, image.grid, view)
            own.append((first + within[::block]) // block)
            first, segment = first + length, segment + 1
        places.append(np.concatenate(own))
    return inputs, places


def _places(config: VisionModelConfig, rows: int, columns: int) -> tuple[np.ndarray, int]:
    """Where a view's patches stand in a run, and how many places they take."""
    if config.tower.window is None:
        return np.arange(rows * columns), rows * columns
    return window_places(config.processor.merge, config.tower.window, rows, columns)


def _empty(config: VisionModelConfig, image: ProcessedImage, size: int) -> VisionInputs:
    """A run of padding."""
    table, shape = config.tower.positions, (1, size)
    taps = 0 if table is None else 4 if table.interpolation == "bilinear" else 16
    return VisionInputs(
        np.zeros((*shape, image.patches.shape[2]), image.patches.dtype),
        None,
        np.full(shape, PADDING, np.int32),
        np.zeros((*shape, 2), np.int32),
        np.zeros((*shape, taps), np.int32) if taps else None,
        np.zeros((*shape, taps), np.float32) if taps else None,
    )


def _put(
    config: VisionModelConfig,
    inputs: VisionInputs,
    at: np.ndarray,
    segment: int,
    grid: tuple[int, int],
    view: np.ndarray,
) -> None:
    """One view's patches at their places."""
    inputs.patches[0, at] = view
    inputs.segments[0, at] = segment  # type: ignore[index]
    inputs.coordinates[0, at] = coordinates(config.processor, *grid)  # type: ignore[index]
    if config.tower.positions is not None:
        taps, weights = position_taps(config.tower.positions, config.processor, *grid)
        used = taps.shape[1]  # one, where the view has the table's own grid
        inputs.taps[0, at, :used] = taps  # type: ignore[index]
        inputs.weights[0, at, :used] = weights  # type: ignore[index]
