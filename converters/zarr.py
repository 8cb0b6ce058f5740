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

from lmdeploy_jax.errors import CheckpointError


def map_array(folder: pathlib.Path, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray | None:
    """The array stored in `folder`, read-only; None where it is not stored plainly in one chunk.

    Raises CheckpointError where the file's size does not fit `shape`, OSError where it is missing.
    """
    if not shape or not math.prod(shape) or not _is_plain(folder, shape, dtype):
        return None
    chunk = folder / ".".join("0" * len(shape))
    expected = math.prod(shape) * dtype.itemsize
    if (size := chunk.stat().st_size) != expected:
        raise CheckpointError(f"{chunk}: damaged: {size} bytes, {list(shape)} of {dtype} takes {expected}")
    return np.memmap(chunk, dtype, mode="r", shape=shape)


def _is_plain(folder: pathlib.Path, shape: tuple[int, ...], dtype: np.dtype) -> bool:
    file = folder / ".zarray"
    if not file.exists():
        return False
    meta: Any = json.loads(file.read_bytes())
    plain = {"zarr_format": 2, "order": "C", "compressor": None, "filters": None}
    layout = {"shape": list(shape), "chunks": list(shape), "dimension_separator": "."}
    named = isinstance(meta, dict) and meta.get("dtype") in (dtype.str, dtype.name)
    return named and all(meta.get(key) == value for key, value in (plain | layout).items())
