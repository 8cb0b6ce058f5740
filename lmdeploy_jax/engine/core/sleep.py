"""An engine asleep: its device memory given back, and taken again."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import jax
import numpy as np
from jax import Array

from lmdeploy_jax.engine.base import KV_CACHE, TAGS, WEIGHTS
from lmdeploy_jax.engine.core.runner import Runner
from lmdeploy_jax.engine.core.scheduler import Scheduler
from lmdeploy_jax.engine.core.state import Leaves
from lmdeploy_jax.logs import logger


class SleepMode:
    """Puts an engine without running sequences to sleep. On the engine's thread.

    `released` names what the device does not hold now. XLA keeps a GPU's memory for this process, unless it
    uses the `platform` allocator; what is given back is free for other arrays of the process.
    """

    def __init__(
        self, runner: Runner, scheduler: Scheduler, reload: Callable[[], tuple[Leaves, Leaves]]
    ) -> None:
        self.released: frozenset[str] = frozenset()
        self._runner = runner
        self._scheduler = scheduler
        self._reload = reload
        self._host_weights: tuple[list[_HostArray], ...] | None = None  # as `DeviceState.weights` has them

    def sleep(self, level: int) -> None:
        """1: weights move to the host's memory; 2: they are dropped, and read from disk again later."""
        if KV_CACHE not in self.released:
            self._runner.release_caches()
            self._scheduler.cache = self._scheduler.cache.emptied()
            if self._scheduler.encoder_cache is not None:
                self._scheduler.encoder_cache.forget()
            self.released |= {KV_CACHE}  # at once: the host may have no room for the weights
        if WEIGHTS not in self.released:
            weights = self._runner.state.weights
            self._host_weights = (
                tuple([_HostArray(x) for x in leaves] for leaves in weights) if level == 1 else None
            )
            self._runner.state.release_weights()
        if level == 2:
            self._host_weights = None
        self.released = frozenset(TAGS)

    def wake(self, tags: Iterable[str]) -> None:
        """Take back what `tags` name, where it has been released."""
        for tag in tags:
            if tag in self.released:
                begun = time.perf_counter()
                if tag == KV_CACHE:
                    self._runner.allocate_caches()
                else:
                    self._runner.state.weights = self._weights()
                self.released -= {tag}
                logger.info("%s are back after %.1f s", tag, time.perf_counter() - begun)

    def _weights(self) -> tuple[Leaves, Leaves]:
        if self._host_weights is None:
            return self._reload()
        decoder, vision = (tuple(array.put() for array in arrays) for arrays in self._host_weights)
        self._host_weights = None  # not before they are back: others may still have the device's memory
        return decoder, vision


class _HostArray:
    """What this process's devices hold of an array."""

    def __init__(self, array: Array) -> None:
        self._shape, self._sharding = array.shape, array.sharding
        self._shards = [(np.array(shard.data), shard.device) for shard in array.addressable_shards]

    def put(self) -> Array:
        shards = [jax.device_put(data, device) for data, device in self._shards]
        return jax.make_array_from_single_device_arrays(self._shape, self._sharding, shards)
