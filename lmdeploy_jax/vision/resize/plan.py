"""What a resize rule decides from a picture's size alone, before any pixel is touched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class ImagePlan:
    """The views of one picture, each [height, width]; token counts follow from it.

    rows, columns: of the tiles that the whole picture is cut in; 1, 1 where it is not cut.
    views: tiles and whole pictures together.
    source: height and width of the picture as it came.
    times, interval: of the views of a video, see `VideoRule`; a picture has no interval.
    """

    source: tuple[int, int]
    height: int
    width: int
    rows: int = 1
    columns: int = 1
    views: int = 1
    times: tuple[float, ...] = ()
    interval: float | None = None

    @property
    def is_video(self) -> bool:
        return self.interval is not None


class ResizeRule(Protocol):
    """A rule of the checkpoints. `plan` is all that counting tokens needs.

    OPTIONS: what a request may ask for with an image -> the field that it sets, a positive integer.
    """

    OPTIONS: ClassVar[Mapping[str, str]]

    def plan(self, height: int, width: int) -> ImagePlan:
        """What becomes of a picture of a size. Raises RequestError for one that the rule refuses."""

    def views(self, image: Image.Image) -> list[np.ndarray]:
        """The views of an RGB picture, as many and as large as planned, each [H, W, 3] of levels 0...255:
        uint8, or float32 where the checkpoint's own rule does not round.
        """


def cut(picture: Image.Image, side: int) -> list[np.ndarray]:
    """Square tiles of a picture whose edges are multiples of `side`, row by row: uint8 [side, side, 3]."""
    whole = np.asarray(picture, np.uint8)
    rows, columns = whole.shape[0] // side, whole.shape[1] // side
    tiles = whole.reshape(rows, side, columns, side, 3).swapaxes(1, 2)
    return list(tiles.reshape(rows * columns, side, side, 3))
