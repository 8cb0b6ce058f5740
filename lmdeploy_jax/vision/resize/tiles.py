"""Rules whose views are squares of one size."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np
from PIL import Image

from lmdeploy_jax.errors import RequestError
from lmdeploy_jax.vision import pixels
from lmdeploy_jax.vision.interpolate import resample_bicubic
from lmdeploy_jax.vision.pixels import BLACK, WHITE, Colour, Resample
from lmdeploy_jax.vision.resize.plan import ImagePlan, cut

MOST_TILES = 1024  # that a request may ask for; grids of so many are gone through one by one


@dataclass(frozen=True)
class FixedSize:
    """Every picture stretched to one square (SigLIP, Gemma 3)."""

    side: int
    resample: Resample = "bicubic"

    OPTIONS: ClassVar[Mapping[str, str]] = {}

    def plan(self, height: int, width: int) -> ImagePlan:
        return ImagePlan((height, width), self.side, self.side)

    def views(self, image: Image.Image) -> list[np.ndarray]:
        return [pixels.levels(pixels.resize(image, self.side, self.side, self.resample))]


@dataclass(frozen=True)
class ShortestEdge:
    """The shorter edge resized to `edge`, then a square cut from the middle (CLIP, LLaVA 1.5).

    square: pad the picture to a square of this colour first, as the first LLaVA 1.5 did.
    """

    edge: int
    side: int
    resample: Resample = "bicubic"
    square: Colour | None = None

    OPTIONS: ClassVar[Mapping[str, str]] = {}

    def plan(self, height: int, width: int) -> ImagePlan:
        return ImagePlan((height, width), self.side, self.side)

    def views(self, image: Image.Image) -> list[np.ndarray]:
        if self.square is not None:
            image = _padded_to_square(image, self.square)
        short, long = sorted(image.size)
        longer = int(self.edge * long / short)
        height, width = (longer, self.edge) if image.width <= image.height else (self.edge, longer)
        resized = pixels.resize(image, height, width, self.resample)
        top, left = (height - self.side) // 2, (width - self.side) // 2
        return [pixels.levels(pixels.crop(resized, top, left, self.side, self.side))]


def _padded_to_square(image: Image.Image, colour: Colour) -> Image.Image:
    side = max(image.size)
    return pixels.pad(image, side, side, (side - image.height) // 2, (side - image.width) // 2, colour)


@dataclass(frozen=True)
class GridRatio:
    """Cut in the grid of tiles whose aspect ratio is nearest, the whole picture after them (InternVL).

    least, most: bounds of the number of tiles in the grid.
    """

    side: int
    least: int = 1
    most: int = 12
    thumbnail: bool = True
    resample: Resample = "bicubic"

    OPTIONS: ClassVar[Mapping[str, str]] = {"max_dynamic_patch": "most", "min_dynamic_patch": "least"}

    def __post_init__(self) -> None:
        if not self.least <= self.most <= MOST_TILES:
            raise RequestError(
                f"min_dynamic_patch is {self.least} and max_dynamic_patch {self.most}; the first may be at "
                f"most the second, and that {MOST_TILES}"
            )

    def plan(self, height: int, width: int) -> ImagePlan:
        columns, rows = self._grid(height, width)
        tiles = rows * columns
        views = tiles + (self.thumbnail and tiles > 1)
        return ImagePlan((height, width), self.side, self.side, rows, columns, views)

    def views(self, image: Image.Image) -> list[np.ndarray]:
        plan, side = self.plan(image.height, image.width), self.side
        tiles = cut(pixels.resize(image, side * plan.rows, side * plan.columns, self.resample), side)
        if plan.views > len(tiles):
            tiles.append(pixels.levels(pixels.resize(image, side, side, self.resample)))
        return tiles

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        """Columns and rows. Of grids equally near, larger ones win while they at most double the area."""
        best, nearest, ratio = (1, 1), math.inf, width / height
        for columns, rows in _grids(self.least, self.most):
            distance = abs(ratio - columns / rows)
            fits = height * width > 0.5 * self.side**2 * columns * rows
            if distance < nearest or (distance == nearest and fits):
                best, nearest = (columns, rows), distance
        return best


@lru_cache(maxsize=64)
def _grids(least: int, most: int) -> tuple[tuple[int, int], ...]:
    """All (columns, rows) of `least` to `most` tiles, those of fewer tiles first."""
    sides = ((columns, range(1, most // columns + 1)) for columns in range(1, most + 1))
    grids = [(columns, rows) for columns, high in sides for rows in high if columns * rows >= least]
    return tuple(sorted(grids, key=lambda grid: grid[0] * grid[1]))


@dataclass(frozen=True)
class Pinpoints:
    """Fitted into the best of a list of resolutions on black, cut in tiles, the whole picture before them
    (LLaVA-NeXT).

    resolutions: (height, width) pairs, multiples of `side`.
    """

    side: int
    resolutions: tuple[tuple[int, int], ...]
    resample: Resample = "bicubic"

    OPTIONS: ClassVar[Mapping[str, str]] = {}

    def plan(self, height: int, width: int) -> ImagePlan:
        best_height, best_width = self.best(height, width)
        rows, columns = best_height // self.side, best_width // self.side
        return ImagePlan((height, width), self.side, self.side, rows, columns, rows * columns + 1)

    def views(self, image: Image.Image) -> list[np.ndarray]:
        height, width = self.best(image.height, image.width)
        new_height, new_width = _fitted(image.height, image.width, height, width, math.ceil)
        fitted = pixels.resize(image, new_height, new_width, self.resample)
        top, left = (height - new_height) // 2, (width - new_width) // 2
        padded = pixels.pad(fitted, height, width, top, left, BLACK)
        whole = pixels.resize(image, self.side, self.side, self.resample)
        return [pixels.levels(whole), *cut(padded, self.side)]

    def best(self, height: int, width: int) -> tuple[int, int]:
        """The resolution that keeps most of the picture's pixels, then the one that wastes the fewest."""

        def worth(resolution: tuple[int, int]) -> tuple[int, int]:
            scale = min(resolution[1] / width, resolution[0] / height)
            kept = min(int(width * scale) * int(height * scale), width * height)
            return kept, kept - resolution[0] * resolution[1]

        return max(self.resolutions, key=worth)


def _fitted(
    height: int, width: int, most_height: int, most_width: int, whole: Callable[[float], int]
) -> tuple[int, int]:
    """The largest size of the same shape within another, in `whole` pixels."""
    scale_width, scale_height = most_width / width, most_height / height
    if scale_width < scale_height:
        return min(whole(height * scale_width), most_height), most_width
    return most_height, min(whole(width * scale_height), most_width)


@dataclass(frozen=True)
class BestFit:
    """Fitted into a canvas of at most `most` tiles on black, at its left and top, and cut in them; the whole
    picture after them where there are several (Llama 4).

    enlarge: to the largest canvas; else to the smallest that shrinks it least, and no further than to a tile.
    """

    side: int
    most: int = 16
    resample: Resample = "bilinear"
    enlarge: bool = False

    OPTIONS: ClassVar[Mapping[str, str]] = {}

    def plan(self, height: int, width: int) -> ImagePlan:
        rows, columns = self.canvas(height, width)
        views = rows * columns + (rows * columns > 1)
        return ImagePlan((height, width), self.side, self.side, rows, columns, views)

    def views(self, image: Image.Image) -> list[np.ndarray]:
        plan = self.plan(image.height, image.width)
        padded = self._fitted(image, self.side * plan.rows, self.side * plan.columns)
        tiles = cut(padded, self.side)
        if plan.views > 1:
            tiles.append(pixels.levels(pixels.resize(image, self.side, self.side, self.resample)))
        return tiles

    def canvas(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tiles. Scales are compared in float32, as the checkpoints' own code does."""
        grids = np.array([grid[::-1] for grid in _grids(1, self.most)])
        scales = ((grids * self.side).astype(np.float32) / np.array([height, width], np.float32)).min(axis=1)
        larger = scales[scales >= 1]
        scale = larger.min() if len(larger) and not self.enlarge else scales.max()
        rows, columns = min(map(tuple, grids[scales == scale]), key=math.prod)
        return int(rows), int(columns)

    def _fitted(self, image: Image.Image, height: int, width: int) -> Image.Image:
        most_height, most_width = height, width
        if not self.enlarge:
            most_height = min(max(image.height, self.side), height)
            most_width = min(max(image.width, self.side), width)
        sizes = _fitted(image.height, image.width, most_height, most_width, math.floor)
        fitted = pixels.resize(image, max(sizes[0], 1), max(sizes[1], 1), self.resample)
        return pixels.pad(fitted, height, width, 0, 0, BLACK)


@dataclass(frozen=True)
class PanAndScan:
    """Long pictures cut along their longer side, the whole one before the crops, all stretched (Gemma 3)."""

    side: int
    least_crop: int
    most_crops: int
    least_ratio: float
    resample: Resample = "bilinear"

    OPTIONS: ClassVar[Mapping[str, str]] = {}

    def plan(self, height: int, width: int) -> ImagePlan:
        crops = self._crops(height, width)
        rows, columns = (crops, 1) if height > width else (1, crops)
        views = 1 + (crops if crops > 1 else 0)
        return ImagePlan((height, width), self.side, self.side, rows, columns, views)

    def views(self, image: Image.Image) -> list[np.ndarray]:
        plan = self.plan(image.height, image.width)
        whole, parts = FixedSize(self.side, self.resample), []
        if plan.views > 1:
            height, width = math.ceil(image.height / plan.rows), math.ceil(image.width / plan.columns)
            corners = [(r * height, c * width) for r in range(plan.rows) for c in range(plan.columns)]
            parts = [_part(image, top, left, height, width) for top, left in corners]
        return [view for part in (image, *parts) for view in whole.views(part)]

    def _crops(self, height: int, width: int) -> int:
        short, long = sorted((height, width))
        if long / short < self.least_ratio:
            return 1
        crops = min(math.floor(long / self.least_crop), math.floor(long / short + 0.5))
        crops = min(self.most_crops, max(2, crops))
        return 1 if min(math.ceil(long / crops), short) < self.least_crop else crops


def _part(image: Image.Image, top: int, left: int, height: int, width: int) -> Image.Image:
    """A part of the picture, which ends where the picture does."""
    return pixels.crop(image, top, left, min(height, image.height - top), min(width, image.width - left))


@dataclass(frozen=True)
class HDTransform:
    """Resized so that its longer edge holds as many tiles as `most` allows, padded with white to whole tiles
    (Phi-3.5-vision).

    The whole picture comes first; it is interpolated from the padded one without rounding: views are float32.
    """

    side: int
    most: int

    OPTIONS: ClassVar[Mapping[str, str]] = {"num_crops": "most"}

    def __post_init__(self) -> None:
        if self.most > MOST_TILES:
            raise RequestError(f"num_crops is {self.most}; it may be at most {MOST_TILES}")

    def plan(self, height: int, width: int) -> ImagePlan:
        short, long = sorted((height, width))
        ratio = long / short
        scale = _largest_scale(ratio, self.most)
        breadth = int(self.side * scale / ratio)
        if not breadth:
            raise RequestError(
                f"the image is {width} pixels wide and {height} high, too thin for this model: crop or pad it"
            )
        across = math.ceil(breadth / self.side)
        rows, columns = (scale, across) if width < height else (across, scale)
        return ImagePlan((height, width), self.side, self.side, rows, columns, rows * columns + 1)

    def views(self, image: Image.Image) -> list[np.ndarray]:
        padded = self._padded(image)
        whole = resample_bicubic(pixels.levels(padded), self.side, self.side)
        return [whole, *(tile.astype(np.float32) for tile in cut(padded, self.side))]

    def _padded(self, image: Image.Image) -> Image.Image:
        """The picture on white, whose sides are whole tiles."""
        upright = image.width < image.height
        if upright:
            image = image.transpose(Image.Transpose.TRANSPOSE)
        plan = self.plan(image.height, image.width)
        width = self.side * plan.columns
        height = int(width / (image.width / image.height))
        resized = pixels.resize(image, height, width, "bilinear")
        whole = plan.rows * self.side
        padded = pixels.pad(resized, whole, width, int((whole - height) / 2), 0, WHITE)
        return padded.transpose(Image.Transpose.TRANSPOSE) if upright else padded


def _largest_scale(ratio: float, most: int) -> int:
    """Tiles along the longer edge, so that all tiles are at most `most`."""
    scale = 1
    while scale * math.ceil(scale / ratio) <= most:
        scale += 1
    return scale - 1
