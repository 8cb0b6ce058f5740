"""Quantising a 16-bit checkpoint as it is read: FP8 with a scale a row."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import ml_dtypes
import numpy as np

from lmdeploy_jax.converters.formats.packing import Rounding
from lmdeploy_jax.converters.formats.parts import Parts, as_slice
from lmdeploy_jax.converters.formats.scheme import Scheme, is_float
from lmdeploy_jax.converters.headers import TensorInfo
from lmdeploy_jax.models.formats import E4M3

FLOAT8 = np.dtype(ml_dtypes.float8_e4m3fn)
LIMIT = float(ml_dtypes.finfo(FLOAT8).max)
LEAST = 1e-7  # of a row's largest element, so that a row of zeros has a scale
PIECE = 1 << 23  # elements that are float32 at a time
LINEAR = re.compile(
    r"(?:.*\.)?layers\.\d+\..*(?<!\.gate)(?<!\.wg)(?<!\.router)\.weight"
)  # but for what decides between experts


@dataclass(frozen=True)
class RoundedTensor:
    """A plain weight [N, K], each row divided by its scale and rounded to E4M3."""

    parts: Parts
    shape: tuple[int, int]
    scheme: Scheme = field(init=False)
    g_idx: None = None

    def __post_init__(self) -> None:
        scheme = Scheme(E4M3, self.shape[1], np.dtype(np.float32), activations=E4M3)
        object.__setattr__(self, "scheme", scheme)

    def elements(self, rows: range, columns: range) -> np.ndarray:
        out = np.empty((len(rows), len(columns)), FLOAT8)
        for at, weight in self._pieces(rows):
            scaled = weight[:, as_slice(columns)] / _scales(weight)
            out[at] = np.clip(scaled, -LIMIT, LIMIT)
        return out

    @property
    def packing(self) -> Rounding:
        return Rounding(self.shape[1])

    def words(self, rows: range, columns: range) -> np.ndarray:
        return self.parts.read("weight", (as_slice(rows), as_slice(columns)))

    def scales(self, rows: range) -> np.ndarray:
        return np.concatenate([_scales(weight) for _, weight in self._pieces(rows)])

    def zeros(self, rows: range) -> None:
        return None

    def row_scales(self, rows: range) -> None:
        return None

    def _pieces(self, rows: range) -> Iterator[tuple[slice, np.ndarray]]:
        """Whole rows in float32, some at a time, and where they belong among `rows`."""
        step = max(1, PIECE // self.shape[1])
        for first in range(0, len(rows), step):
            piece = rows[first : first + step]
            yield slice(first, first + step), self.parts.read("weight", (as_slice(piece),)).astype(np.float32)


def _scales(weight: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(weight).max(1, keepdims=True), LEAST) / np.float32(LIMIT)


def is_linear(name: str, info: TensorInfo) -> bool:
    """Whether a tensor is the weight of a linear layer of a block; embeddings and heads stay as they are."""
    return len(info.shape) == 2 and is_float(info.dtype) and LINEAR.fullmatch(name) is not None
