"""Safetensors checkpoints, read by slice.

The format (https://huggingface.co/docs/safetensors): 8 bytes of little-endian header length, a JSON header
`name -> {dtype, shape, data_offsets}`, then the tensors, row-major, back to back. Headers are checked here
before a byte of data is trusted; data is read with `os.preadv` into buffers of the slice's own size, so host
memory never holds more of a checkpoint than the slices in flight.
"""

from __future__ import annotations

import math
import os
import pathlib
import stat
import weakref
from collections.abc import Mapping

import numpy as np

from lmdeploy_jax.converters.headers import DOWNLOAD_AGAIN, TensorInfo, read_header
from lmdeploy_jax.converters.shards import check_index, find_shards
from lmdeploy_jax.converters.slicing import Index, Ranges, aligned_empty, as_ranges, covers, sizes
from lmdeploy_jax.errors import CheckpointError

PIECE_BYTES = 8 << 20  # largest temporary buffer of one read
MIN_RUN_BYTES = 4096  # shorter runs are cut out of whole rows: a system call costs more than the copy


class CheckpointReader:
    """The tensors of a checkpoint folder; safe to use from several threads.

    Takes `model.safetensors`, or the shards that `model.safetensors.index.json` names, or every
    `*.safetensors` of the folder. Of a tensor in several shards it takes the one that the index names.
    Raises CheckpointError for anything else, and for damage of any kind.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._folder = pathlib.Path(folder)
        self._tensors: dict[str, TensorInfo] = {}
        self._files: dict[pathlib.Path, int] = {}
        self._finalizer = weakref.finalize(self, _close_all, self._files)
        try:
            files, weight_map = find_shards(self._folder)
            for file in files:
                self._add(file, weight_map)
            check_index(self._tensors, weight_map, self._folder)
        except BaseException:
            self.close()
            raise

    @property
    def folder(self) -> pathlib.Path:
        """As it was given."""
        return self._folder

    def names(self) -> tuple[str, ...]:
        """Every tensor's name, in file order."""
        return tuple(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def info(self, name: str) -> TensorInfo:
        """Shape, dtype and place of one tensor; CheckpointError if there is none of that name."""
        if name not in self._tensors:
            raise CheckpointError(f"{self.folder}: no tensor {name!r} in the checkpoint")
        return self._tensors[name]

    def read(self, name: str, index: Index = ()) -> np.ndarray:
        """The slice `index` (step 1) of a tensor as a fresh, 64-byte aligned array of the stored dtype."""
        info = self.info(name)
        out = aligned_empty(sizes(as_ranges(index, info.shape)), info.dtype)
        self.read_into(name, index, out)
        return out

    def read_into(self, name: str, index: Index, out: np.ndarray) -> None:
        """Reads the slice `index` into `out` (the slice's shape), converted to the dtype of `out`."""
        info = self.info(name)
        ranges = as_ranges(index, info.shape)
        if out.shape != sizes(ranges):
            raise ValueError(f"{name}: slice {index} of shape {sizes(ranges)} does not fit {out.shape}")
        if self._files.get(info.file) is None:
            raise CheckpointError(f"{info.file}: the checkpoint has been closed; open it again")
        fill(self._files[info.file], info, ranges, out)

    def close(self) -> None:
        """Closes the files; reading afterwards raises CheckpointError."""
        self._finalizer()

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _add(self, file: pathlib.Path, weight_map: Mapping[str, str]) -> None:
        try:
            # Without O_NONBLOCK a pipe of that name would be waited for.
            self._files[file] = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            if not stat.S_ISREG(os.fstat(self._files[file]).st_mode):
                raise CheckpointError(f"{file}: cannot be read: it is no plain file")
            header = read_header(file, self._files[file])
        except OSError as error:
            raise CheckpointError(f"{file}: cannot be read: {error.strerror}; {DOWNLOAD_AGAIN}") from error
        for name, info in header.items():
            if weight_map.get(name, file.name) != file.name:
                continue
            if name in self._tensors:
                other = self._tensors[name].file.name
                raise CheckpointError(f"{file}: tensor {name!r} is also in {other}; remove one of the two")
            self._tensors[name] = info


def _close_all(files: dict[pathlib.Path, int]) -> None:
    while files:
        os.close(files.popitem()[1])


def fill(fd: int, info: TensorInfo, ranges: Ranges, out: np.ndarray) -> None:
    """Reads the block `ranges` of the tensor at `info` into `out`, converted to its dtype."""
    if out.size:
        _fill(fd, info, info.offset, info.shape, ranges, out)


def _fill(
    fd: int, info: TensorInfo, offset: int, shape: tuple[int, ...], ranges: Ranges, out: np.ndarray
) -> None:
    """Fills `out` with the block `ranges` of the row-major array of `shape` that begins at byte `offset`."""
    if not shape:
        _read_rows(fd, info, offset, (), out.reshape(1), (slice(None),))
        return
    rows, rest = ranges[0], ranges[1:]
    row_bytes = math.prod(shape[1:]) * info.dtype.itemsize
    start = offset + rows.start * row_bytes
    run_bytes = len(rest[-1]) * info.dtype.itemsize if rest else 0
    if covers(rest, shape[1:]) or (run_bytes < MIN_RUN_BYTES and row_bytes <= PIECE_BYTES):
        cut = (slice(None), *(slice(r.start, r.stop) for r in rest))
        _read_rows(fd, info, start, shape[1:], out, cut)
        return
    for row in range(len(rows)):
        _fill(fd, info, start + row * row_bytes, shape[1:], rest, out[row])


def _read_rows(
    fd: int, info: TensorInfo, offset: int, row_shape: tuple[int, ...], out: np.ndarray, cut: Index
) -> None:
    """Reads `len(out)` whole rows and keeps `cut` of them: in place where possible, else piece by piece."""
    if out.dtype == info.dtype and out.flags.c_contiguous and out.shape[1:] == row_shape:
        _read_bytes(fd, info, offset, out)
        return
    row_bytes = max(1, math.prod(row_shape) * info.dtype.itemsize)
    step = max(1, PIECE_BYTES // row_bytes)
    buffer = np.empty((min(step, len(out)), *row_shape), info.dtype)
    for first in range(0, len(out), step):
        piece = buffer[: len(out) - first]
        _read_bytes(fd, info, offset + first * row_bytes, piece)
        np.copyto(out[first : first + step], piece[cut], casting="unsafe")


def _read_bytes(fd: int, info: TensorInfo, offset: int, out: np.ndarray) -> None:
    view = out.reshape(-1).view(np.uint8).data
    while view:
        try:
            count = os.preadv(fd, [view], offset)
        except OSError as error:
            raise CheckpointError(f"{info.file}: reading failed: {error.strerror}") from error
        if count == 0:
            raise CheckpointError(f"{info.file}: the file ends at byte {offset}; {DOWNLOAD_AGAIN}")
        view, offset = view[count:], offset + count
