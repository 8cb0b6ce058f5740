"""Arithmetic on index tuples: what a slice of an array means in contiguous runs of its elements."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

Index = tuple[slice, ...]
Ranges = tuple[range, ...]


def as_ranges(index: Index, shape: tuple[int, ...]) -> Ranges:
    """One step-1 range a dimension; dimensions that `index` leaves out are taken whole.

    Raises ValueError for a step other than 1 or for more slices than dimensions.
    """
    if len(index) > len(shape):
        raise ValueError(f"index {index} has more dimensions than shape {shape}")
    padded = (*index, *(slice(None),) * (len(shape) - len(index)))
    ranges = tuple(range(*part.indices(size)) for part, size in zip(padded, shape, strict=True))
    if any(r.step != 1 for r in ranges):
        raise ValueError(f"index {index} has a step; only step 1 can be read")
    return tuple(range(r.start, max(r.start, r.stop)) for r in ranges)


def sizes(ranges: Ranges) -> tuple[int, ...]:
    """The shape of the block that `ranges` cuts out."""
    return tuple(len(r) for r in ranges)


def covers(ranges: Ranges, shape: tuple[int, ...]) -> bool:
    """Whether `ranges` covers every element of `shape`."""
    return sizes(ranges) == tuple(shape)


def runs(ranges: Ranges, shape: tuple[int, ...]) -> Iterator[range]:
    """The block's elements as runs of flat row-major positions, in the block's own order."""
    if not shape:
        yield range(1)
        return
    if covers(ranges[1:], shape[1:]):
        stride = math.prod(shape[1:])
        yield range(ranges[0].start * stride, ranges[0].stop * stride)
        return
    stride = math.prod(shape[1:])
    for row in ranges[0]:
        for run in runs(ranges[1:], shape[1:]):
            yield range(row * stride + run.start, row * stride + run.stop)


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array on a 64-byte boundary, which JAX's CPU backend takes over without a copy."""
    count = math.prod(shape) * dtype.itemsize
    raw = np.empty(count + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + count].view(dtype).reshape(shape)
