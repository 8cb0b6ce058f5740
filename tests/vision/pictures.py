"""Pictures for tests, drawn from numbers: hard edges on noise, at any size."""

from __future__ import annotations

import numpy as np
from PIL import Image

SIZES = ((1, 1), (1, 4000), (4000, 1), (37, 53), (333, 777), (600, 800), (448, 448), (1080, 1920))
"""Height and width: single pixels, lines, odd sizes, and one that Pillow 13 resizes in another order."""


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    """Noise with squares of full black and white, in RGB."""
    rng = np.random.default_rng(seed + 7919 * height + width)
    rows, columns = np.arange(height)[:, None] // 5, np.arange(width)[None] // 7
    board = ((rows + columns) % 3)[..., None] * 127
    noise = rng.integers(0, 256, (height, width, 3))
    return Image.fromarray(np.where(board == 127, noise, board).astype(np.uint8))
