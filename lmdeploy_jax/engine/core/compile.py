"""Ahead-of-time compilation: in threads, with progress told and a cache that outlives the process."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Lock

import jax
from jax.sharding import Mesh

from lmdeploy_jax.engine.core.program import Program
from lmdeploy_jax.engine.core.program_cache import Key, ProgramCache
from lmdeploy_jax.engine.progress import announce, counting_bar
from lmdeploy_jax.errors import ConfigError
from lmdeploy_jax.models import tuning
from lmdeploy_jax.models.formats import WeightFormat
from lmdeploy_jax.models.tuning import UNTUNED, Tuning
from lmdeploy_jax.parallel.peers import why_not_reached

log = logging.getLogger("lmdeploy_jax")
COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
NEVER = 1e9  # seconds


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
    """The user's cache folder for compiled programs. Raises ConfigError where the user has no home."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        return Path(base).expanduser() / "lmdeploy_jax" / "compiled"
    except RuntimeError as error:
        raise ConfigError(
            "there is no home folder for compiled programs: set HOME, or XDG_CACHE_HOME to another folder"
        ) from error


def tuning_dir() -> Path:
    """Where `bench tune` puts what it measures on this machine."""
    return default_cache_dir().parent / "kernels"


def tuning_of(mesh: Mesh, backend: str) -> Tuning:
    """What ships and what `bench tune` found on this machine; only the GPU's own kernels can be tuned."""
    if backend != "pallas":
        return UNTUNED
    found = tuning.load(mesh.devices.flat[0].device_kind, tuning_dir())
    why = why_not_reached(list(mesh.devices.flat)) if found.all_reduce == "pallas" else None
    if why is not None:
        log.warning("small sums over devices are XLA's: %s", why)
        return replace(found, all_reduce=None)
    return found


def use_cache(folder: str | os.PathLike[str] | None) -> Path | None:
    """Keep what is compiled in `folder`: None is the default folder, "" switches that off. -> Where the
    engine's programs belong; JAX's cache beside them has what is compiled on the way.
    """
    if folder == "":
        return None
    base = Path(folder) if folder else default_cache_dir()
    jax.config.update("jax_compilation_cache_dir", str(base / "jax"))
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    OUTSIDE_JAX_CACHE.apply()
    return base / "programs"


def compile_all(
    programs: Mapping[Key, Program], cache: ProgramCache, *, progress: bool
) -> dict[Key, jax.stages.Compiled]:
    """Every program, from the cache or compiled; the largest are begun first. Raises what the first failing
    compilation raises, and KeyboardInterrupt, without waiting for those that run.
    """
    start = time.perf_counter()
    order = sorted(programs, key=lambda key: (-key[1], key[0]))
    try:
        with _workers() as pool:
            ready = _read(order, cache, pool, progress)
            missing = {key: programs[key] for key in order if key not in ready}
            ready |= _compile(missing, cache, pool, progress)
    except KeyboardInterrupt:
        announce(progress, "interrupted")
        raise
    took = time.perf_counter() - start
    log.info("compiled %d programs and read %d in %.1f s", len(missing), len(ready) - len(missing), took)
    return ready


@contextmanager
def _workers() -> Iterator[ThreadPoolExecutor]:
    """Threads that are not waited for after an exception: XLA cannot be interrupted. What is queued is
    dropped.
    """
    pool = ThreadPoolExecutor(min(16, os.cpu_count() or 1))
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()


def _read(
    keys: Sequence[Key], cache: ProgramCache, pool: ThreadPoolExecutor, progress: bool
) -> dict[Key, jax.stages.Compiled]:
    """Programs that the cache folder holds. One whose file is damaged is missing."""
    stored = [key for key in keys if cache.holds(key)]
    found = {}
    with counting_bar(progress, "reading", len(stored)) as advance:
        for key, program in zip(stored, pool.map(cache.load, stored), strict=True):
            advance(1)
            if program is not None:
                found[key] = program
    return found


def _compile(
    programs: Mapping[Key, Program], cache: ProgramCache, pool: ThreadPoolExecutor, progress: bool
) -> dict[Key, jax.stages.Compiled]:
    ready, futures = {}, {}
    with counting_bar(progress, "compiling", len(programs)) as advance:
        # Lowering is Python, which one thread does as fast as many.
        for key, program in programs.items():
            futures[pool.submit(_compile_and_store, program.lower(), program, cache)] = key
        for future in as_completed(futures):
            ready[futures[future]] = future.result()
            advance(1)
    return ready


def read_or_compile(program: Program, cache: ProgramCache) -> jax.stages.Compiled:
    """One program, from the cache or compiled."""
    return cache.load(program.key) or _compile_and_store(program.lower(), program, cache)


def _compile_and_store(
    lowered: jax.stages.Lowered, program: Program, cache: ProgramCache
) -> jax.stages.Compiled:
    with OUTSIDE_JAX_CACHE:
        compiled = lowered.compile(program.compiler_options)
    cache.store(program.key, compiled)
    return compiled


def compiler_options(
    platform: str, formats: Iterable[WeightFormat], nodes: int = 1
) -> dict[str, bool | int | str]:
    """What XLA is told of every program of a model with weights in such formats.

    Where both sides of a product have 8 bits, XLA on a GPU would compile and time dozens of Triton kernels
    for each size, minutes in all, before it takes cuBLASLt's. Several nodes would deal out among themselves
    what is to be timed, and wait for those that have found the program in their cache.
    """
    rounds = platform == "gpu" and any(held.rounds_activations for held in formats)
    options: dict[str, bool | int | str] = {"xla_gpu_enable_triton_gemm": False} if rounds else {}
    if platform == "gpu" and nodes > 1:
        options["xla_gpu_shard_autotuning"] = False
    return options


class _OutsideJaxCache:
    """What comes from JAX's cache on a CPU cannot be serialised again, so our programs never enter it.

    JAX has one setting for all threads; engines may start side by side.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._users = 0

    def __enter__(self) -> None:
        with self._lock:
            self._users += 1
        self.apply()

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._users -= 1
        self.apply()

    def apply(self) -> None:
        """While nobody is within, even what compiles in no time is kept."""
        with self._lock:
            least = NEVER if self._users else 0.0
            jax.config.update("jax_persistent_cache_min_compile_time_secs", least)


OUTSIDE_JAX_CACHE = _OutsideJaxCache()
