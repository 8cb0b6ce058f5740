"""Ahead-of-time compilation: in threads, with a progress bar and a cache that outlives the process."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from lmdeploy_jax.engine.progress import counting_bar

log = logging.getLogger("lmdeploy_jax")
COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
Key = tuple[str, int]


@dataclass(frozen=True)
class Program:
    """A function with the shapes it is to be compiled for."""

    function: Callable[..., Any]
    args: tuple[Any, ...]  # pytrees of ShapeDtypeStruct with shardings
    out_shardings: Any
    donate: tuple[int, ...] = ()

    def lower(self) -> jax.stages.Lowered:
        jitted = jax.jit(self.function, donate_argnums=self.donate, out_shardings=self.out_shardings)
        return jitted.lower(*self.args)


class CompileCounter:
    """Counts XLA compilations in this process from its creation on; while serving there must be none."""

    def __init__(self) -> None:
        self.count = 0
        self.seconds = 0.0
        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    def _on_event(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event == COMPILE_EVENT:
            self.count += 1
            self.seconds += duration_secs


def default_cache_dir() -> Path:
    """The user's cache folder for compiled programs."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "lmdeploy_jax" / "xla"


def tuning_dir() -> Path:
    """Where `bench tune` puts what it measures on this machine."""
    return default_cache_dir().parent / "kernels"


def use_cache(folder: str | None) -> None:
    """Keep compiled programs in `folder`: None is the default folder, "" switches the cache off."""
    if folder == "":
        return
    jax.config.update("jax_compilation_cache_dir", str(folder or default_cache_dir()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def compile_all(programs: Mapping[Key, Program], *, progress: bool) -> dict[Key, jax.stages.Compiled]:
    """Compile every program; the largest are begun first. Raises what the first failing compilation
    raises.

    Programs are lowered one after another, always in the same order: kernels that several of them share are
    numbered as they are lowered, and the persistent cache finds only what is the same to the last byte.
    """
    start = time.perf_counter()
    compiled: dict[Key, jax.stages.Compiled] = {}
    workers = min(16, os.cpu_count() or 1)
    with counting_bar(progress, "compiling", len(programs)) as advance, ThreadPoolExecutor(workers) as pool:
        order = sorted(programs, key=lambda key: (-key[1], key[0]))
        futures = {pool.submit(programs[key].lower().compile): key for key in order}
        for future in as_completed(futures):
            compiled[futures[future]] = future.result()
            advance()
    log.info("compiled %d programs in %.1f s", len(compiled), time.perf_counter() - start)
    return compiled


class LazyPrograms(dict[Key, jax.stages.Compiled]):
    """Compiles each program when it is first asked for."""

    def __init__(self, programs: Mapping[Key, Program]) -> None:
        super().__init__()
        self._programs = programs

    def __missing__(self, key: Key) -> jax.stages.Compiled:
        self[key] = compiled = self._programs[key].lower().compile()
        return compiled
