"""Weights onto devices: every shard is read alone and leaves host memory as soon as its device has it."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np
from jax.sharding import Sharding

from lmdeploy_jax.converters.slicing import Index, aligned_empty, as_ranges, sizes


class Readable(Protocol):
    """A weight of the model, or one of its arrays, in a checkpoint."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of all of it."""

    def read(self, index: Index, dtype: np.dtype) -> np.ndarray:
        """The slice `index`, as `dtype`."""


class Upload(NamedTuple):
    """A shard that its device makes of arrays as they lie in a file: `finish` of them there."""

    arrays: tuple[np.ndarray, ...]
    finish: Callable[..., jax.Array]


@runtime_checkable
class Uploadable(Readable, Protocol):
    """A weight that devices can make of what the file has, where the host would take longer."""

    def upload(self, index: Index) -> Upload | None:
        """What makes the slice `index`; None: the host has to."""


Fetch = Callable[[Index], "np.ndarray | Upload"]
Progress = Callable[[int, int], None]

THREADS = 8
BYTES_IN_FLIGHT = 512 << 20
PIECE_BYTES = 32 << 20  # of a shard, from twice which on it is read in several pieces at once


@dataclass(frozen=True)
class Placement:
    """One array to make: `fetch` gives any slice of it, of any float dtype, or what makes it."""

    shape: tuple[int, ...]
    dtype: np.dtype
    sharding: Sharding
    fetch: Fetch

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    @property
    def shard_bytes(self) -> int:
        """Host bytes that placing it needs at once: one shard."""
        return math.prod(self.sharding.shard_shape(self.shape)) * np.dtype(self.dtype).itemsize


def place(shape: tuple[int, ...], dtype: np.dtype, sharding: Sharding, fetch: Fetch) -> jax.Array:
    """The array over `sharding`, made of this process's shards; one on several devices is fetched once."""
    owners: dict[tuple[range, ...], list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        owners.setdefault(as_ranges(index or (), shape), []).append(device)
    shards = []
    for ranges, devices in owners.items():
        block = fetch(tuple(slice(r.start, r.stop) for r in ranges))
        copies = [_put(block, dtype, device) for device in devices]
        shards += jax.block_until_ready(copies)
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)


def _put(block: np.ndarray | Upload, dtype: np.dtype, device: jax.Device) -> jax.Array:
    if isinstance(block, Upload):
        return block.finish(*(jax.device_put(array, device) for array in block.arrays))
    return jax.device_put(block.astype(dtype, copy=False), device)


def load_parallel(
    placements: Mapping[str, Placement],
    *,
    threads: int = THREADS,
    bytes_in_flight: int = BYTES_IN_FLIGHT,
    progress: Progress | None = None,
) -> dict[str, jax.Array]:
    """Makes every array, several at a time, with at most `bytes_in_flight` of shards (or one) on the host.

    `progress(done, total)` is called in bytes at the start and after each array. The first error ends it and
    is raised, as KeyboardInterrupt is; what has begun is waited for, since it reads the checkpoint's files.
    """
    budget = _Budget(bytes_in_flight)
    report = _Report(sum(item.nbytes for item in placements.values()), progress)
    report.add(0)

    def make(item: Placement) -> jax.Array:
        with budget.hold(item.shard_bytes):
            array = place(item.shape, item.dtype, item.sharding, item.fetch)
        report.add(item.nbytes)
        return array

    pool = ThreadPoolExecutor(threads, thread_name_prefix="load")
    try:
        futures = {name: pool.submit(make, item) for name, item in placements.items()}
        wait(futures.values(), return_when=FIRST_EXCEPTION)
    finally:
        pool.shutdown(cancel_futures=True)
    if error := next((e for f in futures.values() if not f.cancelled() and (e := f.exception())), None):
        raise error
    return {name: future.result() for name, future in futures.items()}


def load_leaves(
    leaves: Mapping[str, Readable],
    specs: Mapping[str, jax.ShapeDtypeStruct],
    progress: Progress | None = None,
) -> dict[str, jax.Array]:
    """Every bound leaf as an array of its spec's dtype and sharding."""
    with ThreadPoolExecutor(THREADS, thread_name_prefix="read") as readers:
        placements = {name: _placement(leaf, specs[name], readers) for name, leaf in leaves.items()}
        return load_parallel(placements, progress=progress)


def _placement(leaf: Readable, spec: jax.ShapeDtypeStruct, readers: ThreadPoolExecutor) -> Placement:
    dtype, sharding = np.dtype(spec.dtype), spec_sharding(spec)
    source = leaf if isinstance(leaf, Uploadable) and not _on_cpu(sharding) else None

    def fetch(index: Index) -> np.ndarray | Upload:
        found = None if source is None else source.upload(index)
        return _read(leaf, index, dtype, readers) if found is None else found

    return Placement(leaf.shape, dtype, sharding, fetch)


def _read(leaf: Readable, index: Index, dtype: np.dtype, readers: ThreadPoolExecutor) -> np.ndarray:
    """`leaf.read`, of a large slice in runs of its first axis: a layer's experts are one array."""
    ranges = as_ranges(index, leaf.shape)
    shape = sizes(ranges)
    pieces = min(math.prod(shape) * dtype.itemsize // PIECE_BYTES, shape[0] if shape else 1)
    if pieces < 2:
        return leaf.read(index, dtype)
    out = aligned_empty(shape, dtype)
    ends = [shape[0] * piece // pieces for piece in range(pieces + 1)]

    def read(begin: int, end: int) -> None:
        rows = slice(ranges[0].start + begin, ranges[0].start + end)
        out[begin:end] = leaf.read((rows, *index[1:]), dtype)

    list(readers.map(read, ends[:-1], ends[1:]))
    return out


def _on_cpu(sharding: Sharding) -> bool:
    devices: set[jax.Device] = sharding.device_set
    return any(device.platform == "cpu" for device in devices)


def spec_sharding(spec: jax.ShapeDtypeStruct) -> Sharding:
    """The spec's sharding; the default device where it names none."""
    return spec.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])


class _Budget:
    """Bytes that may be held at once. A request larger than all of it waits until it is alone."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0
        self.freed = threading.Condition()

    @contextmanager
    def hold(self, count: int) -> Iterator[None]:
        count = min(count, self.limit)
        with self.freed:
            self.freed.wait_for(lambda: self.held + count <= self.limit)
            self.held += count
        try:
            yield
        finally:
            with self.freed:
                self.held -= count
                self.freed.notify_all()


class _Report:
    """Counts finished bytes and passes them on, one call at a time."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self.total = total
        self.done = 0
        self.progress = progress
        self.lock = threading.Lock()

    def add(self, count: int) -> None:
        with self.lock:
            self.done += count
            if self.progress is not None:
                self.progress(self.done, self.total)
