"""A cache that is bounded by bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

V = TypeVar("V")


class LruCache(Generic[V]):
    """Forgets what has not been used for longest once all values together are larger than `limit` bytes.

    size_of: a value's bytes now, which may grow. Not for several threads at once.
    """

    def __init__(self, limit: int, size_of: Callable[[V], int]) -> None:
        self._limit = limit
        self._size_of = size_of
        self._values: OrderedDict[str, V] = OrderedDict()

    def get(self, key: str) -> V | None:
        if key in self._values:
            self._values.move_to_end(key)
        return self._values.get(key)

    def put(self, key: str, value: V) -> None:
        """Keep it, unless it alone is too large."""
        self._values.pop(key, None)
        self._values[key] = value
        total = sum(map(self._size_of, self._values.values()))
        while total > self._limit:
            total -= self._size_of(self._values.popitem(last=False)[1])

    def __len__(self) -> int:
        return len(self._values)
