"""transformers' image processors as they were on Pillow up to 12, whichever release is installed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from PIL import Image


@contextmanager
def rows_first() -> Iterator[None]:
    """Within it, `Image.resize` filters rows first; our own code is to be tested outside of it."""
    resize = Image.Image.resize

    def in_two_steps(self: Image.Image, size: tuple[int, int], resample: Any = None, **_: Any) -> Image.Image:
        return resize(resize(self, (size[0], self.height), resample), tuple(size), resample)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image.Image, "resize", in_two_steps)
        yield


def processed(processor: Any, images: Any, tensors: str) -> Any:
    """What an image processor of transformers makes of images."""
    with rows_first():
        return processor(images, return_tensors=tensors)
