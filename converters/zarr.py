"""Plain Zarr v2 arrays (https://zarr-specs.readthedocs.io/en/latest/v2/v2.0.html) as memory maps.

An uncompressed array of one chunk is a file of the array's bytes. A map of it can be handed to the devices
with no copy in between; on a CPU it becomes the weight itself.
"""

from __future__ import annotations

import json
import math
import pathlib
from typing import Any

import numpy as np

from lmdeploy_jax.converters.headers import TensorInfo
from lmdeploy_jax.converters.safetensors import fill
from lmdeploy_jax.converters.slicing import Index, aligned_empty, as_ranges, covers, sizes
from lmdeploy_jax.errors import CheckpointError


def find_array(folder: pathlib.Path, shape: tuple[int, ...], dtype: np.dtype) -> TensorInfo | None:
    """Where the array in `folder` lies; None where it is not stored plainly in one chunk.

    Raises CheckpointError where the file's size does not fit `shape`, OSError where it is missing.
    """
    if not shape or not math.prod(shape) or not _is_plain(folder, shape, dtype):
        return None
    info = TensorInfo(shape, dtype, folder / ".".join("0" * len(shape)), 0)
    if (size := info.file.stat().st_size) != info.nbytes:
        raise CheckpointError(f"{info.file}: damaged: {size} bytes, {list(shape)} takes {info.nbytes}")
    return info


def read_array(info: TensorInfo, index: Index, dtype: np.dtype) -> np.ndarray:
    """A slice of the array as `dtype`: a map of the file where that is all of it as it is, else a copy."""
    ranges = as_ranges(index, info.shape)
    if dtype == info.dtype and covers(ranges, info.shape):
        return np.memmap(info.file, dtype, mode="r", shape=info.shape)
    out = aligned_empty(sizes(ranges), dtype)
    with info.file.open("rb", buffering=0) as file:
        fill(file.fileno(), info, ranges, out)
    return out


def _is_plain(folder: pathlib.Path, shape: tuple[int, ...], dtype: np.dtype) -> bool:
    file = folder / ".zarray"
    if not file.exists():
        return False
    meta: Any = json.loads(file.read_bytes())
    plain = {"zarr_format": 2, "order": "C", "compressor": None, "filters": None}
    layout = {"shape": list(shape), "chunks": list(shape), "dimension_separator": "."}
    named = isinstance(meta, dict) and meta.get("dtype") in (dtype.str, dtype.name)
    return named and all(meta.get(key) == value for key, value in (plain | layout).items())
