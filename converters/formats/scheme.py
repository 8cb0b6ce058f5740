"""What quantised weights of every format have in common: elements, scales and zero points in one layout.

A weight W [N, K] is `(element - zero) * scale`; columns in groups share a scale and a zero point. On the
host a weight is [N, K] of one element a place; `pack_words` makes of 4-bit elements what lies on the devices.
"""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np

from lmdeploy_jax.models.formats import E2M1, INT4, PER_WORD

E2M1_VALUES = np.array(
    [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32
)  # by code: the highest bit is the sign
SYMMETRIC_ZERO = {INT4: 8}  # of weights without zero points; int8, and floats, are signed


@dataclass(frozen=True)
class Scheme:
    """How a weight is held.

    element: INT4, whose elements are 0 to 15, INT8, E4M3, E5M2 or E2M1.
    group: columns that share a scale; the last group of a weight may have fewer.
    scale: the dtype of the scales, one a row and group.
    has_zeros: whether there are zero points, one a scale; without them int4's are 8, and the others' 0.
    has_row_scales: whether a float32 a row multiplies its scales.
    activations: what the checkpoint's author meant activations to be rounded to: INT8, E4M3, or None.
    input_scale: what they are divided by before; None: a scale of each row's own.
    """

    element: str
    group: int
    scale: np.dtype
    has_zeros: bool = False
    has_row_scales: bool = False
    activations: str | None = None
    input_scale: float | None = None


def element_values(elements: np.ndarray, element: str) -> np.ndarray:
    """What elements stand for before zero point and scale, as float32."""
    return E2M1_VALUES[elements] if element == E2M1 else elements.astype(np.float32)


def pack_words(codes: np.ndarray, tile: int) -> np.ndarray:
    """Codes [n, k] of 4 bits -> uint16 [n, k / 4].

    Within each `tile` of columns, nibble q of word j holds column `q * tile / 4 + j`: a word is as wide as
    what a kernel multiplies with, so that unpacking is a shift and a mask, and moves nothing between threads.
    """
    rows, columns = codes.shape
    width = tile // PER_WORD
    words = np.empty((rows, columns // tile, width), np.uint16)
    together = np.dtype(np.uint64 if width % 8 == 0 else np.uint8)  # numpy takes as long for one as for eight
    size, four = together.itemsize, together.type(4)
    quarters = np.ascontiguousarray(codes).view(together).reshape(rows, -1, PER_WORD, width // size)
    for index in range(width // size):
        first, second, third, fourth = (quarters[:, :, part, index] for part in range(PER_WORD))
        low, high = ((a | b << four).view(np.uint8) for a, b in ((first, second), (third, fourth)))
        pairs = low | high.astype(np.uint16) << np.uint16(8)
        words[:, :, index * size : (index + 1) * size] = pairs.reshape(*words.shape[:2], size)
    return words.reshape(rows, columns // PER_WORD)


def unpack_words(words: np.ndarray, tile: int) -> np.ndarray:
    """The inverse of `pack_words`: uint8 codes [n, k]."""
    rows, count = words.shape
    tiles = words.reshape(rows, -1, 1, tile // PER_WORD)
    shifts = np.arange(0, 16, 4, dtype=np.uint16)[:, None]
    return (tiles >> shifts & 15).astype(np.uint8).reshape(rows, count * PER_WORD)


def nibbles(packed: np.ndarray) -> np.ndarray:
    """uint8 [..., n] -> codes uint8 [..., 2 n], the low nibble first."""
    pairs = packed.astype("<u2", order="C")
    pairs |= pairs << 4
    pairs &= 0x0F0F
    return pairs.view(np.uint8)


def is_float(dtype: np.dtype) -> bool:
    """Whether a tensor of this dtype is a plain weight, or scales that are plain numbers."""
    return dtype in (np.float16, np.float32, np.float64, ml_dtypes.bfloat16)
