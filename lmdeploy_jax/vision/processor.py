"""A picture -> the patches that a tower takes: resize rule, block order, patch vectors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from lmdeploy_jax.errors import RequestError
from lmdeploy_jax.vision import pixels
from lmdeploy_jax.vision.resize import HDTransform, ImagePlan, ResizeRule

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)
DETAILS = {"auto": None, "low": 6, "medium": 12, "high": 24}
"""Tiles at most for OpenAI's `detail`, as LMDeploy counts them; None: as the checkpoint says."""


@dataclass(frozen=True)
class View:
    """One view as a tower takes it: levels [patches, C * frames * P * P], and rows and columns of patches."""

    patches: np.ndarray
    grid: tuple[int, int]


@dataclass(frozen=True)
class ProcessedImage:
    """One picture as a tower takes it.

    patches: levels 0...255, [views, patches a view, C * frames * P * P], uint8 or float32, not yet
        normalised: the tower does that, so that a quarter of the bytes cross to the device.
    grid: rows and columns of patches of a view.
    """

    plan: ImagePlan
    patches: np.ndarray
    grid: tuple[int, int]

    @property
    def views(self) -> list[View]:
        """Its views, in order."""
        return [View(patches, self.grid) for patches in self.patches]

    def parts(self) -> list[ProcessedImage]:
        """What stands for itself in a prompt: a picture, or each view of a video."""
        if not self.plan.is_video:
            return [self]
        plan = replace(self.plan, views=1, times=())
        return [replace(self, plan=plan, patches=self.patches[i : i + 1]) for i in range(len(self.patches))]


@dataclass(frozen=True)
class ImageProcessor:
    """How a checkpoint's images are prepared.

    patch: pixels a side of a patch.
    merge: patches a side of a block; a view's patches are listed block by block, so that merging them is a
        reshape.
    columns_first: blocks are listed column by column (InternVL's first pixel shuffle).
    frames: pictures of a patch; a still image is repeated.
    mean, std: of each channel, levels being 0...1.
    """

    rule: ResizeRule
    patch: int
    merge: int = 1
    columns_first: bool = False
    frames: int = 1
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD

    def with_options(self, options: Mapping[str, Any]) -> ImageProcessor:
        """The processor of an image for which a request asks for something: the options of its rule, and
        `detail`, which chooses among numbers of tiles and is passed over where there is nothing to choose.

        Raises RequestError for an option that the rule does not have, or a value that it cannot take.
        """
        rule, known = self.rule, self.rule.OPTIONS
        wanted = dict(options)
        detail = wanted.pop("detail", "auto")
        if detail not in DETAILS:
            raise RequestError(f"detail is {detail!r}; choose {', '.join(DETAILS)}")
        if "max_dynamic_patch" in known and DETAILS[detail] is not None:
            wanted.setdefault("max_dynamic_patch", DETAILS[detail])
        for name, value in wanted.items():
            if name not in known:
                raise RequestError(f"image option {name} is unknown to this model; known: {_listed(known)}")
            if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
                raise RequestError(f"image option {name} is {value!r}; it must be a positive integer")
            rule = replace(rule, **{known[name]: value})  # type: ignore[type-var]
        return replace(self, rule=rule)

    @property
    def dtype(self) -> np.dtype:
        """Of the patches: where a rule does not round, their levels lie between those of 8 bits."""
        return np.dtype(np.float32 if isinstance(self.rule, HDTransform) else np.uint8)

    def plan(self, height: int, width: int) -> ImagePlan:
        """The views of a picture of a size. Raises RequestError for a size that the rule refuses."""
        return self.rule.plan(height, width)

    def grid(self, plan: ImagePlan) -> tuple[int, int]:
        """Rows and columns of patches of a view."""
        return plan.height // self.patch, plan.width // self.patch

    def tokens(self, plan: ImagePlan) -> tuple[int, int]:
        """Rows and columns of merged patches of a view."""
        rows, columns = self.grid(plan)
        return rows // self.merge, columns // self.merge

    def __call__(self, image: Image.Image) -> ProcessedImage:
        """An image of any mode. Raises RequestError for one that cannot be read as the rules want it."""
        image = pixels.to_rgb(image)
        plan = self.plan(image.height, image.width)
        patches = np.stack([self.patchify(view) for view in self.rule.views(image)])
        return ProcessedImage(plan, patches, self.grid(plan))

    def video(self, frames: Iterable[Image.Image]) -> ProcessedImage:
        """Frames of one size, in order: a view for each `frames` of them, the last one repeated to fill it
        up. They are resized as they come.

        The rule's bounds are a frame's. Raises RequestError for no frames, and for frames of several sizes.
        """
        sizes, resized = set(), []
        for picture in map(pixels.to_rgb, frames):
            sizes.add((picture.height, picture.width))
            if len(sizes) == 1:
                resized += self.rule.views(picture)
        if len(sizes) != 1:
            raise RequestError(f"a video of {len(resized)} frames must have one or more, all of one size")
        plan, stack = self.plan(*sizes.pop()), np.stack(resized)
        missing = -len(stack) % self.frames
        groups = np.concatenate([stack, np.repeat(stack[-1:], missing, axis=0)])
        groups = groups.reshape(-1, self.frames, *groups.shape[1:])
        patches = np.stack([self.patchify(group) for group in groups])
        return ProcessedImage(replace(plan, views=len(patches)), patches, self.grid(plan))

    def patchify(self, view: np.ndarray) -> np.ndarray:
        """A view [H, W, C], or frames of one [T, H, W, C] -> [patches, C * T * P * P], block by block."""
        stack = np.broadcast_to(view, (self.frames, *view.shape)) if view.ndim == 3 else view
        count, patch = len(stack), self.patch
        rows, columns = stack.shape[1] // patch, stack.shape[2] // patch
        split = stack[:, : rows * patch, : columns * patch].reshape(count, rows, patch, columns, patch, -1)
        return self.listed(split.transpose(1, 3, 5, 0, 2, 4).reshape(rows, columns, -1))

    def listed(self, grid: np.ndarray) -> np.ndarray:
        """Values of a view's patches [rows, columns, ...] in the order of its patches, [patches, ...]."""
        return block_order(grid, self.merge, columns_first=self.columns_first)


def _listed(known: Mapping[str, str]) -> str:
    return ", ".join(("detail", *known))


def block_order(grid: np.ndarray, merge: int, *, columns_first: bool = False) -> np.ndarray:
    """Values of a grid [rows, columns, ...] -> [rows * columns, ...], block of `merge` x `merge` by block.

    Within a block they go row by row. `columns_first`: so do the columns of blocks, one after the other.
    """
    rows, columns, *rest = grid.shape
    blocks = grid.reshape(rows // merge, merge, columns // merge, merge, *rest)
    order = (2, 0, 1, 3) if columns_first else (0, 2, 1, 3)
    return blocks.transpose(*order, *range(4, blocks.ndim)).reshape(rows * columns, *rest)
