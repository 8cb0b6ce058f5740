"""Which layers share which arrays of the KV cache: pure Python, decided once for a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lmdeploy_jax.cache.kinds import PagedCache


@dataclass(frozen=True)
class CacheLayout:
    """The arrays of a cache, and where each layer finds its own.

    Layers that keep the same tokens of a sequence form a *group*, which has a page table of its own.
    """

    arrays: tuple[PagedCache, ...]
    places: tuple[tuple[int, int], ...]
    """Of each layer: its group, and the index of its arrays."""

    @property
    def num_groups(self) -> int:
        return 1 + max(group for group, _ in self.places)


def one_group(layers: Sequence[PagedCache]) -> CacheLayout:
    """Every layer keeps every token, in arrays of its own."""
    return CacheLayout(tuple(layers), tuple((0, i) for i in range(len(layers))))
