"""Several engines with a copy of the model each, behind the face of one (data parallelism, `dp`).

Each is in a process of its own with devices of its own. A request goes where most of its prompt has been
computed before, unless so much more waits there that computing it again elsewhere is less work.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import Future, wait
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from lmdeploy_jax.cache.pages import PAGE_SIZE
from lmdeploy_jax.cache.prefix import next_hash
from lmdeploy_jax.config import JaxEngineConfig
from lmdeploy_jax.engine.base import TAGS, EngineBase
from lmdeploy_jax.engine.facts import EngineFacts, EngineStats
from lmdeploy_jax.engine.forks import OwnerProcess
from lmdeploy_jax.engine.process.remote import RemoteEngine
from lmdeploy_jax.engine.process.worker import open_replica
from lmdeploy_jax.engine.request import Request
from lmdeploy_jax.errors import EngineError
from lmdeploy_jax.prompt import EncodedPrompt

# Tokens of a prompt that a request in flight counts as: its answer makes every step there a little longer.
# A conversation so stays where its pages are, and a prefix that all requests share spreads in the end.
REQUEST_TOKENS = 64

Build = Callable[[int, str | Path, JaxEngineConfig, bool], EngineBase]


def open_remote(model: str | Path, config: JaxEngineConfig, *, progress: bool = True) -> EngineBase:
    """An engine outside this process, or `config.dp` of them. Raises what `RemoteEngine` raises."""
    if config.dp == 1:
        return RemoteEngine(model, config, progress=progress)
    return Replicas(model, config, progress=progress)


class Replicas(EngineBase):
    """`config.dp` engines. The first starts alone, so that the others find its compiled programs.

    One that ends takes the requests that run there with it; later ones go to the others. Raises what
    `RemoteEngine` raises, EngineError where there are too few GPUs.
    """

    in_process = False

    def __init__(
        self,
        model: str | Path,
        config: JaxEngineConfig,
        *,
        progress: bool = True,
        build: Build = open_replica,
    ) -> None:
        self.owner = OwnerProcess()
        self._lock = threading.Lock()  # what one request is weighed by includes the one before it

        def start(rank: int) -> RemoteEngine:
            shown = progress and rank == 0
            return RemoteEngine(model, config, progress=shown, build=partial(build, rank))

        self._engines = [start(0)]
        try:
            self._engines += _in_threads([partial(start, rank) for rank in range(1, config.dp)])
            self.facts = _common(self._engines, config)
        except BaseException:
            self.close()
            raise
        cached = self.facts.num_pages if config.enable_prefix_caching else 0
        self._prefixes = [KnownPrefixes(cached) for _ in self._engines]

    def submit(self, request: Request) -> None:
        with self._lock:
            hashes = self._prefixes[0].hashes(request.prompt)
            while True:
                rank = self._best(len(request.prompt), hashes)
                try:
                    self._engines[rank].submit(request)
                    break
                except EngineError:
                    if self._engines[rank].failure is None or self.failure is not None:
                        raise  # it works, or no other does
            self._prefixes[rank].add(hashes)

    def _best(self, tokens: int, hashes: list[bytes]) -> int:
        """The engine with the least work before and for a prompt; among those alike the first."""

        def work(rank: int) -> tuple[bool, int]:
            engine, known = self._engines[rank], self._prefixes[rank].tokens(hashes)
            return engine.failure is not None, tokens - known + REQUEST_TOKENS * engine.unfinished

        return min(range(len(self._engines)), key=work)

    def abort(self, request_id: int, index: int | None = None) -> None:
        for engine in self._engines:  # those that do not know it leave it alone
            engine.abort(request_id, index)

    def sleep(self, level: int = 1) -> None:
        _in_threads([partial(engine.sleep, level) for engine in self._working()])

    def wake(self, tags: Iterable[str] = TAGS) -> None:
        wanted = tuple(tags)
        _in_threads([partial(engine.wake, wanted) for engine in self._working()])

    @property
    def sleeping(self) -> bool:
        return any(engine.sleeping for engine in self._working())

    @property
    def failure(self) -> str | None:
        """Of the first, once none works any more."""
        return None if any(engine.failure is None for engine in self._engines) else self._engines[0].failure

    @property
    def stats(self) -> EngineStats:
        """Of all together."""
        each = [engine.stats for engine in self._engines]
        return EngineStats(*(sum(getattr(stats, x.name) for stats in each) for x in fields(EngineStats)))

    @property
    def max_batch_size(self) -> int:
        """Of all that work together; one request has one engine's (`facts`)."""
        return sum(engine.max_batch_size for engine in self._working())

    @property
    def on_step(self) -> Callable[[int], None] | None:
        return self._engines[0].on_step

    @on_step.setter
    def on_step(self, told: Callable[[int], None] | None) -> None:
        for engine in self._engines:
            engine.on_step = told

    def close(self) -> None:
        _in_threads([engine.close for engine in self._engines])

    def _working(self) -> list[RemoteEngine]:
        return [each for each in self._engines if each.failure is None] or self._engines[:1]


class KnownPrefixes:
    """The pages that a replica probably holds: those of the prompts it was given last, as many as it has."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._pages: OrderedDict[bytes, None] = OrderedDict()

    def hashes(self, prompt: EncodedPrompt) -> list[bytes]:
        """Of each full page of a prompt but for its last token, which is always computed."""
        found: list[bytes] = []
        for start in range(0, len(prompt) - PAGE_SIZE if self._capacity else 0, PAGE_SIZE):
            found.append(next_hash(found[-1] if found else None, prompt, prompt.ids, start))
        return found

    def tokens(self, hashes: list[bytes]) -> int:
        """Those of a prompt's first pages that are known."""
        known = next((i for i, each in enumerate(hashes) if each not in self._pages), len(hashes))
        return known * PAGE_SIZE

    def add(self, hashes: list[bytes]) -> None:
        """Its first pages are forgotten last: others begin with them too."""
        for each in reversed(hashes):
            self._pages[each] = None
            self._pages.move_to_end(each)
        while len(self._pages) > self._capacity:
            self._pages.popitem(last=False)


def _common(engines: list[RemoteEngine], config: JaxEngineConfig) -> EngineFacts:
    """What holds for a request wherever it goes. Raises EngineError where one has no GPU and others have."""
    first = engines[0].facts
    for rank, engine in enumerate(engines):
        if engine.facts.on_cpu != first.on_cpu:
            needed = config.dp * config.tp
            raise EngineError(
                f"dp={config.dp} copies of the model on tp={config.tp} devices each need {needed} GPUs, and "
                f"copy {rank + 1} found none; lower dp or tp."
            )
    return replace(first, num_pages=min(engine.facts.num_pages for engine in engines))


def _in_threads(calls: list[Callable[[], Any]]) -> list[Any]:
    """All at once; waits for all of them, then raises what the first of them raised, if any did."""
    futures: list[Future[Any]] = [Future() for _ in calls]

    def run(call: Callable[[], Any], future: Future[Any]) -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    # An executor takes nothing more once the interpreter ends, which is when many engines are closed.
    threads = [threading.Thread(target=run, args=each) for each in zip(calls, futures, strict=True)]
    for thread in threads:
        thread.start()
    wait(futures)
    return [future.result() for future in futures]
