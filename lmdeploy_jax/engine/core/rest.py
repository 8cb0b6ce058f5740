"""An engine at rest: its device memory given back, and taken again."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import jax
import numpy as np

from lmdeploy_jax.converters.load import LoadedModel
from lmdeploy_jax.engine.base import KV_CACHE, TAGS, WEIGHTS
from lmdeploy_jax.engine.core.runner import Runner
from lmdeploy_jax.engine.core.scheduler import Scheduler
from lmdeploy_jax.errors import RequestError
from lmdeploy_jax.logs import logger


class Rest:
    """Puts an engine without running sequences to sleep. On the engine's thread.

    `missing` names what the device does not hold now. XLA keeps a GPU's memory for this process, unless it
    uses the `platform` allocator; what is given back is free for other arrays of the process.
    """

    def __init__(self, runner: Runner, scheduler: Scheduler, reload: Callable[[], LoadedModel]) -> None:
        self.missing: frozenset[str] = frozenset()
        self._runner = runner
        self._scheduler = scheduler
        self._reload = reload
        self._kept: list[np.ndarray] | None = None  # weights in the host's memory
        self._shardings: list[jax.sharding.Sharding] = []

    def sleep(self, level: int) -> None:
        """1: weights move to the host's memory; 2: they are dropped, and read from disk again later."""
        if level not in (1, 2):
            raise RequestError(f"level={level} is invalid: it must be 1 or 2.")
        if KV_CACHE not in self.missing:
            self._runner.release_caches()
            self._scheduler.cache = self._scheduler.cache.emptied()
        if WEIGHTS not in self.missing:
            self._shardings = [leaf.sharding for leaf in self._runner.state.leaves]
            self._kept = [np.array(leaf) for leaf in self._runner.state.leaves] if level == 1 else None
            self._runner.state.release_leaves()
        if level == 2:
            self._kept = None
        self.missing = frozenset(TAGS)

    def wake(self, tags: Iterable[str]) -> None:
        """Take back what `tags` name and what is missing of it."""
        for tag in tags:
            if tag not in TAGS:
                raise RequestError(f"tag {tag!r} is unknown: give {' or '.join(TAGS)}.")
            if tag in self.missing:
                begun = time.perf_counter()
                if tag == KV_CACHE:
                    self._runner.allocate_caches()
                else:
                    self._runner.state.leaves = self._weights()
                self.missing -= {tag}
                logger.info("%s are back after %.1f s", tag, time.perf_counter() - begun)

    def _weights(self) -> tuple[jax.Array, ...]:
        if self._kept is None:
            return self._reload().leaves
        kept, self._kept = self._kept, None
        return tuple(jax.device_put(array, place) for array, place in zip(kept, self._shardings, strict=True))
