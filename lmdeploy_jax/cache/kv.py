"""The KV cache's device arrays, and how many pages of them fit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import psutil
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lmdeploy_jax.cache.kinds import CacheKind, PagedCache, PageKind, StateCache
from lmdeploy_jax.cache.layout import CacheLayout
from lmdeploy_jax.errors import ConfigError
from lmdeploy_jax.parallel.mesh import model_axes

CPU_CACHE_LIMIT = 2 << 30  # bytes; on a CPU the cache shares memory with everything else of the user's


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """What all layers keep of all sequences (or, of equal structure, the specs or shardings of that)."""

    arrays: tuple[tuple[Array, ...], ...]
    layout: CacheLayout = field(metadata={"static": True})

    def of_mixer(self, mixer: int) -> tuple[Array, ...]:
        """The arrays of a mixer, numbered through all layers; see its kind in `cache.kinds`."""
        return self.arrays[self.layout.places[mixer][1]]

    def with_mixer(self, mixer: int, arrays: tuple[Array, ...]) -> KVCache:
        """With those arrays in place of the mixer's."""
        i = self.layout.places[mixer][1]
        return replace(self, arrays=(*self.arrays[:i], arrays, *self.arrays[i + 1 :]))

    def map_pages(self, change: Callable[[Array], Array]) -> KVCache:
        """With every array changed that has a row a page."""
        return self._map(change, states=False)

    def map_states(self, change: Callable[[Array], Array]) -> KVCache:
        """With every array changed that has a row a slot."""
        return self._map(change, states=True)

    def _map(self, change: Callable[[Array], Array], *, states: bool) -> KVCache:
        kinds = zip(self.layout.arrays, self.arrays, strict=True)
        return replace(
            self,
            arrays=tuple(
                tuple(map(change, arrays)) if isinstance(kind, StateCache) is states else arrays
                for kind, arrays in kinds
            ),
        )


@dataclass(frozen=True)
class CacheSpec:
    """A cache of `num_pages` pages and, where layers keep states, `num_slots` slots."""

    layout: CacheLayout
    num_pages: int
    dtype: Any
    mesh: Mesh
    num_slots: int = 0

    @property
    def specs(self) -> KVCache:
        arrays: Any = tuple(tuple(self._arrays(kind)) for kind in self.layout.arrays)
        return KVCache(arrays, self.layout)

    @property
    def shardings(self) -> KVCache:
        return jax.tree.map(lambda spec: spec.sharding, self.specs)

    def _arrays(self, kind: CacheKind) -> Iterator[jax.ShapeDtypeStruct]:
        where = NamedSharding(self.mesh, cache_spec(kind, self.mesh))
        by_slot = isinstance(kind, StateCache)
        shapes = kind.shapes(self.num_slots if by_slot else self.num_pages)
        for shape, dtype in zip(shapes, kind.dtypes(self.dtype), strict=True):
            yield jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    def allocate(self) -> KVCache:
        """Zeros: a page's unwritten rows are multiplied by zero probabilities, and zero times garbage may be
        NaN.
        """
        return jax.tree.map(lambda spec: _zeros(spec.shape, spec.dtype, spec.sharding)(), self.specs)


def cache_spec(kind: CacheKind, mesh: Mesh) -> PartitionSpec:
    """How arrays of that kind are cut over the devices that share a model."""
    return PartitionSpec(*(None if axis is None else model_axes(mesh) for axis in kind.axes))


@cache
def _zeros(shape: tuple[int, ...], dtype: Any, where: NamedSharding) -> Callable[[], Array]:
    return jax.jit(partial(jnp.zeros, shape, dtype), out_shardings=where)


def page_bytes(arrays: Iterable[PageKind], dtype: Any, devices: int = 1) -> int:
    """Bytes of one page over all arrays and all devices."""
    return sum(kind.page_bytes(jnp.dtype(dtype).itemsize, devices) for kind in arrays)


def gain(arrays: Sequence[PageKind], dtype: Any) -> float:
    """How many times as many pages fit the same memory because some of the arrays are quantised."""
    return page_bytes(unquantised(arrays), dtype) / page_bytes(arrays, dtype)


def unquantised(arrays: Sequence[PageKind]) -> list[PageKind]:
    """The same arrays in the model's dtype."""
    return [replace(kind, format=None) if isinstance(kind, PagedCache) else kind for kind in arrays]


def state_bytes(layout: CacheLayout, dtype: Any, num_slots: int) -> int:
    """Bytes of so many slots over all arrays and all devices."""
    return num_slots * sum(kind.slot_bytes(jnp.dtype(dtype).itemsize) for kind in layout.states)


def free_bytes(mesh: Mesh) -> int:
    """Memory that is free now, summed over the mesh's devices as if others had what this process's have; on a
    CPU, the machine's.
    """
    if mesh.devices.flat[0].platform == "cpu":
        return psutil.virtual_memory().available
    stats = [device.memory_stats() for device in mesh.local_devices]
    return mesh.devices.size * min(s["bytes_limit"] - s["bytes_in_use"] for s in stats)


@dataclass(frozen=True)
class MemoryPlan:
    """How much memory the KV cache gets and what it holds, decided before anything is allocated."""

    free: int
    reserved: int  # for the steps' own arrays, and images'
    page_bytes: int
    num_pages: int
    room: int  # tokens of context that fit, in sequences of the greatest length
    images: int = 0  # of what is reserved: rows of images, and the encoder's largest run
    states: int = 0  # of what is reserved: those of recurrent layers, of all sequences that run at once
    gain: float = 1.0  # how many times the tokens it holds that it would hold unquantised

    @property
    def cache_bytes(self) -> int:
        return self.num_pages * self.page_bytes

    def __str__(self) -> str:
        gb = 1e-9
        parts = {"images": self.images, "states": self.states}
        named = ", ".join(f"{size * gb:.2f} GB of them for {what}" for what, size in parts.items() if size)
        besides = f" ({named})" if named else ""
        return (
            f"memory: {self.free * gb:.2f} GB free, {self.reserved * gb:.2f} GB kept for the steps{besides}, "
            f"{self.cache_bytes * gb:.2f} GB for the KV cache = {self.num_pages} pages = {self.room} tokens"
            + (f", quantised: {self.gain:.2f} times as many" if self.gain != 1 else "")
        )


def plan_memory(
    layout: CacheLayout,
    page: int,
    *,
    share: float,
    free: int,
    reserved: int,
    images: int = 0,
    states: int = 0,
    session_len: int,
    sequences: int,
    on_cpu: bool,
    gain: float = 1.0,
) -> MemoryPlan:
    """Pages of `page` bytes for `share` (a fraction of free memory below 1, bytes from 1 on), never more than
    `sequences` of `session_len` tokens need. `reserved` bytes are kept for the steps, `images` and `states`
    besides.

    Raises ConfigError where not even one page of each cache group fits.
    """
    reserved += images + states
    budget = share if share >= 1 else share * max(free - reserved, 0)
    if on_cpu and share < 1:
        budget = min(budget, CPU_CACHE_LIMIT)
    pages = int(budget // page)
    if share < 1:  # free memory differs a little from start to start, and compiled programs know the number
        pages -= pages % (1 << max(pages.bit_length() - 7, 0))
    pages = min(pages, sequences * layout.pages_of(session_len) + 1)
    least = len(layout.groups) + 1
    if pages < least:
        taken = f" States of {sequences} sequences take {states * 1e-6:.3f} MB." if states else ""
        raise ConfigError(
            f"cache_max_entry_count={share!r} leaves no room for the KV cache: it gives "
            f"{budget * 1e-6:.3f} MB, and at least {least} pages of {page * 1e-6:.3f} MB are needed. "
            f"Raise it, or free memory (a smaller max_batch_size or model, a larger tp).{taken}"
        )
    room = layout.room(pages - 1, session_len)
    return MemoryPlan(free, reserved, page, pages, room, images, states, gain)
