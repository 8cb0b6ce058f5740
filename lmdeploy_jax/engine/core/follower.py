"""A node that follows: it has weights, caches and programs as the leader has, and no requests of its own."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import jax

from lmdeploy_jax.config import JaxEngineConfig
from lmdeploy_jax.engine.core.published import Put, Result, Run, Sleep, Wake
from lmdeploy_jax.engine.core.setup import Parts, set_up
from lmdeploy_jax.engine.core.sleep import SleepMode
from lmdeploy_jax.engine.forks import claim_jax
from lmdeploy_jax.engine.nodes.cluster import Follower


def follow(model: str | Path, config: JaxEngineConfig, *, progress: bool = True) -> None:
    """Do what node 0 tells until it closes. Raises what `Engine` raises, EngineError where node 0 is lost."""
    claim_jax()
    parts = set_up(model, config, progress=progress)
    nodes = parts.nodes
    assert isinstance(nodes, Follower)
    try:
        node = _Node(parts)
        while (message := nodes.next_message()) is not None:
            node.do(message)
    finally:
        nodes.close()  # or else node 0 would learn of an error here when this process has ended


class _Node:
    def __init__(self, parts: Parts) -> None:
        self._programs = parts.programs
        self._sleep_mode = SleepMode(parts.runner, parts.scheduler, parts.reload)
        self._results: dict[int, jax.Array] = {}
        self._numbers = itertools.count()

    def do(self, message: Any) -> None:
        match message:
            case Run(key, inputs, forgotten):
                for number in forgotten:
                    del self._results[number]
                self._keep(self._programs[key](**{name: self._given(x) for name, x in inputs.items()}))
            case Put(array):
                self._keep(self._programs.put(array))
            case Sleep(level):
                self._sleep_mode.sleep(level)
            case Wake(tags):
                self._sleep_mode.wake(tags)

    def _given(self, value: Any) -> Any:
        return self._results[value.number] if isinstance(value, Result) else value

    def _keep(self, result: Any) -> None:
        for array in jax.tree.leaves(result):
            self._results[next(self._numbers)] = array
