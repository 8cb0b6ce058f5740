"""Rules that keep a picture's shape: one view of whole blocks of patches, as many as the picture needs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from PIL import Image

from lmdeploy_jax.errors import RequestError
from lmdeploy_jax.vision import pixels
from lmdeploy_jax.vision.pixels import BLACK, Resample
from lmdeploy_jax.vision.resize.plan import ImagePlan

MOST_RATIO = 200  # of the longer to the shorter edge


@dataclass(frozen=True)
class SmartResize:
    """Edges rounded to multiples of `factor`, the area brought within bounds (Qwen-VL, GLM-V).

    factor: pixels a side of what becomes one token.
    least, most: bounds of the pixels.
    frames: pictures that count as one against the bounds (GLM-V counts a still image twice).
    enlarges: a picture with an edge below `factor` is enlarged first (GLM-V), so that its ratio stays.
    """

    factor: int
    least: int
    most: int
    frames: int = 1
    enlarges: bool = False
    resample: Resample = "bicubic"

    OPTIONS: ClassVar[Mapping[str, str]] = {"min_pixels": "least", "max_pixels": "most"}

    def __post_init__(self) -> None:
        if self.least > self.most:
            raise RequestError(f"min_pixels is {self.least}, more than max_pixels={self.most}; lower it")

    @property
    def most_pixels(self) -> int:
        """Of the largest view that it makes: a thin one keeps a block, whatever its area is then."""
        most = self.most // self.frames
        return max(most, self.factor * math.isqrt(most * MOST_RATIO))

    def plan(self, height: int, width: int) -> ImagePlan:
        new_height, new_width = self._size(*self._enlarged(height, width))
        return ImagePlan((height, width), new_height, new_width)

    def views(self, image: Image.Image) -> list[np.ndarray]:
        return _resized(self.plan(image.height, image.width), image, self.resample)

    def _enlarged(self, height: int, width: int) -> tuple[int, int]:
        if not self.enlarges or min(height, width) >= self.factor:
            return height, width
        scale = max(self.factor / height, self.factor / width)
        return int(height * scale), int(width * scale)

    def _size(self, height: int, width: int) -> tuple[int, int]:
        factor = self.factor
        if max(height, width) / min(height, width) > MOST_RATIO:
            raise RequestError(
                f"the image is {width} pixels wide and {height} high; its longer edge may be at most "
                f"{MOST_RATIO} times the shorter one: crop or pad it"
            )
        rounded = round(height / factor) * factor, round(width / factor) * factor
        area = self.frames * height * width
        if self.frames * math.prod(rounded) > self.most:
            shrink = math.sqrt(area / self.most)
            floors = (math.floor(edge / shrink / factor) * factor for edge in (height, width))
            rounded = max(factor, next(floors)), max(factor, next(floors))
        elif self.frames * math.prod(rounded) < self.least:
            grow = math.sqrt(self.least / area)
            rounded = math.ceil(height * grow / factor) * factor, math.ceil(width * grow / factor) * factor
        return rounded


def _resized(plan: ImagePlan, image: Image.Image, resample: Resample) -> list[np.ndarray]:
    return [pixels.levels(pixels.resize(image, plan.height, plan.width, resample))]


@dataclass(frozen=True)
class LongestEdge:
    """Shrunk until both edges are at most `edge`, then stretched up to multiples of `factor` (Pixtral)."""

    edge: int
    factor: int
    resample: Resample = "bicubic"

    OPTIONS: ClassVar[Mapping[str, str]] = {}

    @property
    def most_pixels(self) -> int:
        """Of the largest view that it makes."""
        return (math.ceil(self.edge / self.factor) * self.factor) ** 2

    def plan(self, height: int, width: int) -> ImagePlan:
        ratio = max(height / self.edge, width / self.edge)
        kept = [math.floor(size / ratio) if ratio > 1 else size for size in (height, width)]
        # A picture so thin that nothing would be left of it keeps one block.
        new_height, new_width = (max(1, (size - 1) // self.factor + 1) * self.factor for size in kept)
        return ImagePlan((height, width), new_height, new_width)

    def views(self, image: Image.Image) -> list[np.ndarray]:
        return _resized(self.plan(image.height, image.width), image, self.resample)


@dataclass(frozen=True)
class NaViT:
    """Shrunk until its patches are few enough, padded with black to whole blocks right and below (Kimi-VL).

    most: patches; most_side: patches along an edge.
    """

    patch: int
    factor: int
    most: int
    most_side: int = 512
    resample: Resample = "bicubic"

    OPTIONS: ClassVar[Mapping[str, str]] = {}

    @property
    def most_pixels(self) -> int:
        """Of the largest view that it makes."""
        return (math.ceil(self.most_side * self.patch / self.factor) * self.factor) ** 2

    def plan(self, height: int, width: int) -> ImagePlan:
        padded = (math.ceil(edge / self.factor) * self.factor for edge in self._size(height, width))
        return ImagePlan((height, width), next(padded), next(padded))

    def views(self, image: Image.Image) -> list[np.ndarray]:
        height, width = self._size(image.height, image.width)
        resized = pixels.resize(image, height, width, self.resample)
        plan = self.plan(image.height, image.width)
        return [pixels.levels(pixels.pad(resized, plan.height, plan.width, 0, 0, BLACK))]

    def _size(self, height: int, width: int) -> tuple[int, int]:
        patches = max(1, height // self.patch) * max(1, width // self.patch)
        longest = self.most_side * self.patch
        scale = min(1.0, math.sqrt(self.most / patches), longest / height, longest / width)
        size = (min(max(1, int(edge * scale)), longest) for edge in (height, width))
        return next(size), next(size)


@dataclass(frozen=True)
class PatchBudget:
    """Brought to the area of `most` blocks, edges then rounded down to multiples of `factor` (Gemma 4)."""

    factor: int
    most: int
    resample: Resample = "bicubic"

    OPTIONS: ClassVar[Mapping[str, str]] = {}

    @property
    def most_pixels(self) -> int:
        """Of the largest view that it makes."""
        return self.most * self.factor**2

    def plan(self, height: int, width: int) -> ImagePlan:
        scale = math.sqrt(self.most_pixels / (height * width))
        rows, columns = (math.floor(scale * edge / self.factor) for edge in (height, width))
        # A picture so thin that nothing would be left of it keeps a line of blocks.
        if not rows:
            rows, columns = 1, min(width // height, self.most)
        elif not columns:
            rows, columns = min(height // width, self.most), 1
        return ImagePlan((height, width), rows * self.factor, columns * self.factor)

    def views(self, image: Image.Image) -> list[np.ndarray]:
        return _resized(self.plan(image.height, image.width), image, self.resample)


PACKED = (LongestEdge, NaViT, PatchBudget, SmartResize)
