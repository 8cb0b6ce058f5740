"""The header of a safetensors file: parsed, and checked against the format and the file's size."""

from __future__ import annotations

import json
import math
import os
import pathlib
import struct
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from lmdeploy_jax.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000  # the limit of the reference implementation
MAX_BYTES = 1 << 48  # no tensor comes near; larger products overflow the sizes of NumPy

DTYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "F32": np.dtype(np.float32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F64": np.dtype(np.float64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}

DOWNLOAD_AGAIN = "download the file again"


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: `offset` is its first byte counted from the start of `file`."""

    shape: tuple[int, ...]
    dtype: np.dtype
    file: pathlib.Path
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(file: pathlib.Path, fd: int) -> dict[str, TensorInfo]:
    """Parses and checks one file's header against the format and the file's size."""
    size = os.fstat(fd).st_size
    prefix = os.pread(fd, 8, 0)
    if prefix.startswith(b"version "):
        raise CheckpointError(f"{file}: a git-lfs pointer, not the tensors; run 'git lfs pull' in its folder")
    if len(prefix) < 8:
        raise CheckpointError(f"{file}: {size} bytes are too few for a safetensors file; {DOWNLOAD_AGAIN}")
    (length,) = struct.unpack("<Q", prefix)
    if length > min(size - 8, MAX_HEADER_BYTES):
        raise CheckpointError(
            f"{file}: header length {length} does not fit the file's {size} bytes: it is truncated or "
            f"is not a safetensors file; {DOWNLOAD_AGAIN}"
        )
    header = parse_json(os.pread(fd, length, 8), file)
    header.pop("__metadata__", None)
    data = 8 + length
    tensors = {name: _tensor_info(name, entry, file, data) for name, entry in header.items()}
    _check_layout(tensors, file, data, size)
    return tensors


def parse_json(text: bytes, file: pathlib.Path) -> dict[str, Any]:
    """A JSON object with unique keys, `file` or its header; anything else is a CheckpointError."""
    try:
        parsed = json.loads(text.decode("utf-8"), object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: not valid JSON ({error}); {DOWNLOAD_AGAIN}") from error
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{file}: header is a JSON {type(parsed).__name__}, not an object")
    return parsed


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for key, value in pairs:
        if key in table:
            raise ValueError(f"key {key!r} stands twice")
        table[key] = value
    return table


def _tensor_info(name: str, entry: Any, file: pathlib.Path, data: int) -> TensorInfo:
    where = f"{file}: tensor {name!r}"
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise CheckpointError(f"{where}: header entry lacks dtype, shape or data_offsets; {DOWNLOAD_AGAIN}")
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise CheckpointError(f"{where}: dtype {entry['dtype']!r} is not one of {', '.join(DTYPES)}")
    shape, offsets = entry["shape"], entry["data_offsets"]
    sound = are_sizes(shape) and math.prod(size for size in shape if size) < MAX_BYTES
    if not sound or not are_sizes(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{where}: shape {shape!r} or data_offsets {offsets!r} is malformed")
    info = TensorInfo(tuple(shape), dtype, file, data + offsets[0])
    if offsets[1] - offsets[0] != info.nbytes:
        raise CheckpointError(
            f"{where}: shape {shape} of {dtype} takes {info.nbytes} bytes, data_offsets {offsets} give "
            f"{offsets[1] - offsets[0]}; {DOWNLOAD_AGAIN}"
        )
    return info


def are_sizes(value: Any) -> bool:
    """Whether a value of a JSON file is a list of sizes or offsets."""
    return isinstance(value, list) and all(type(item) is int and 0 <= item < MAX_BYTES for item in value)


def _check_layout(tensors: dict[str, TensorInfo], file: pathlib.Path, data: int, size: int) -> None:
    """Tensors lie back to back and end where the file ends: no overlap, no hole, nothing cut off."""
    end = data
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if info.offset != end:
            fault = "overlaps the tensor before it" if info.offset < end else "follows a hole"
            raise CheckpointError(f"{file}: tensor {name!r} at byte {info.offset} {fault}; {DOWNLOAD_AGAIN}")
        end += info.nbytes
        if end > size:
            raise CheckpointError(
                f"{file}: tensor {name!r} ends at byte {end}, but the file has {size} bytes: it is "
                f"truncated; {DOWNLOAD_AGAIN}"
            )
    if end != size:
        raise CheckpointError(f"{file}: {size - end} bytes follow the last tensor; {DOWNLOAD_AGAIN}")
