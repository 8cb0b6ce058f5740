"""transformers resizes as Pillow up to 12 does, whichever release is installed."""

from __future__ import annotations

from typing import Any

import pytest
from PIL import Image


@pytest.fixture(autouse=True)
def rows_first(monkeypatch: pytest.MonkeyPatch) -> None:
    resize = Image.Image.resize

    def in_two_steps(self: Image.Image, size: tuple[int, int], resample: Any = None, **_: Any) -> Image.Image:
        return resize(resize(self, (size[0], self.height), resample), tuple(size), resample)

    monkeypatch.setattr(Image.Image, "resize", in_two_steps)
