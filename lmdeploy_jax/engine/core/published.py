"""The leader's programs: what they are given is told to the other nodes before it is dispatched.

An array that an earlier program has given travels as its number. Every node numbers the same results in the
same order, and keeps them until the leader's own is gone.
"""

from __future__ import annotations

import itertools
import weakref
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from lmdeploy_jax.engine.core.program import Program, Programs
from lmdeploy_jax.engine.core.program_cache import Key
from lmdeploy_jax.engine.nodes.cluster import OneNode


class Run(NamedTuple):
    """A program's call. forgotten: numbers of results that no later call is given."""

    key: Key
    inputs: dict[str, Any]
    forgotten: list[int]


class Put(NamedTuple):
    """An array that goes to every device, and has a number from then on."""

    array: np.ndarray


class Result(NamedTuple):
    """The number of an array that stands in a call's input."""

    number: int


class Sleep(NamedTuple):
    """See `SleepMode.sleep`."""

    level: int


class Wake(NamedTuple):
    """See `SleepMode.wake`."""

    tags: tuple[str, ...]


class PublishedProgram(Program):
    """A `Program` that runs on all nodes."""

    _publish: Publisher

    def __init__(self, key: Key, function: Any, programs: PublishedPrograms, **options: Any) -> None:
        super().__init__(key, function, programs, **options)
        self._publish = programs.publish

    def __call__(self, **inputs: Any) -> Any:
        self._publish.run(self.key, inputs)
        return self._publish.numbered(super().__call__(**inputs))


class PublishedPrograms(Programs):
    """The `Programs` of node 0."""

    program_type = PublishedProgram

    def __init__(self, nodes: OneNode, *args: Any) -> None:
        super().__init__(*args)
        self.publish = Publisher(nodes.tell)

    def put(self, array: Any) -> Any:
        self.publish.put(array)
        return self.publish.numbered(super().put(array))


class Publisher:
    """Tells of calls, and knows which arrays have numbers."""

    def __init__(self, tell: Callable[[Any], None]) -> None:
        self._tell = tell
        self._numbers = itertools.count()
        self._known: dict[int, tuple[int, weakref.ref[jax.Array]]] = {}  # by the array's id
        self._forgotten: deque[int] = deque()

    def run(self, key: Key, inputs: dict[str, Any]) -> None:
        told = {name: self._told(value) for name, value in inputs.items()}
        forgotten = [self._forgotten.popleft() for _ in range(len(self._forgotten))]
        self._tell(Run(key, told, forgotten))

    def put(self, array: np.ndarray) -> None:
        self._tell(Put(array))

    def numbered(self, result: Any) -> Any:
        """The same; each of its arrays has a number from now on."""
        for array in jax.tree.leaves(result):
            place, number = id(array), next(self._numbers)
            self._known[place] = number, weakref.ref(array, partial(self._forget, place, number))
        return result

    def _told(self, value: Any) -> Any:
        return Result(self._known[id(value)][0]) if isinstance(value, jax.Array) else value

    def _forget(self, place: int, number: int, _: object) -> None:
        del self._known[place]
        self._forgotten.append(number)
