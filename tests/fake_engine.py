"""An engine without a model: a script says which tokens each sequence gets, one a step."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from lmdeploy_jax.cache.layout import CacheGroup, CacheLayout
from lmdeploy_jax.cache.pages import PAGE_SIZE
from lmdeploy_jax.config import JaxEngineConfig
from lmdeploy_jax.engine.base import TAGS, EngineBase
from lmdeploy_jax.engine.facts import EngineFacts, EngineStats, Startup
from lmdeploy_jax.engine.forks import OwnerProcess
from lmdeploy_jax.engine.request import Request, StepOutput, TokenLogprobs
from lmdeploy_jax.errors import EngineError
from lmdeploy_jax.prompt import EncodedPrompt

Script = Callable[[Request, int], Iterable[int]]  # (request, which sequence) -> its tokens
STEP = 0.001  # seconds
WIDTH = 4  # of the rows given out as logits and hidden states


class FakeEngine(EngineBase):
    """`gate` cleared holds it before its next step; `seen` keeps every request."""

    def __init__(
        self,
        folder: Path,
        script: Script,
        *,
        session_len: int = 512,
        vocab_size: int = 2560,
        max_batch_size: int = 64,
    ) -> None:
        self.owner = OwnerProcess()
        self.facts = EngineFacts(
            folder=folder,
            config=JaxEngineConfig(),
            model_config=SimpleNamespace(
                vocab_size=vocab_size, hidden_size=WIDTH, score=None, judges_only=False
            ),
            session_len=session_len,
            max_batch_size=max_batch_size,
            num_pages=10**6,
            cache_layout=CacheLayout((CacheGroup(),), (), ()),
            startup=Startup("scripted", 0, 0.0, 0.0),
        )
        self.script = script
        self.seen: list[Request] = []
        self.aborted: list[tuple[int, int | None]] = []
        self.gate = threading.Event()
        self.gate.set()
        self._released: set[str] = set()
        self._inbox: deque[Callable[[], None]] = deque()
        self._live: dict[tuple[int, int], _Run] = {}
        self._pages: set[int] = set()  # hashes of the prompts' full pages
        self._wake = threading.Condition()
        self._closed = False
        self._failure: str | None = None
        self._thread = threading.Thread(target=self._loop, daemon=True)
        self._thread.start()

    @property
    def failure(self) -> str | None:
        return self._failure or ("it has been closed" if self._closed else None)

    def submit(self, request: Request) -> None:
        self._check(request)
        self.seen.append(request)
        self._post(lambda: self._add(request))

    def abort(self, request_id: int, index: int | None = None) -> None:
        self.aborted.append((request_id, index))
        if not self._closed:
            self._post(lambda: self._abort(request_id, index))

    @property
    def sleeping(self) -> bool:
        return bool(self._released)

    def sleep(self, level: int = 1) -> None:
        self._check_level(level)
        done = threading.Event()
        self._post(lambda: self._sleep(done))
        done.wait()

    def _sleep(self, done: threading.Event) -> None:
        self._released = set(TAGS)
        for request_id, index in list(self._live):
            self._abort(request_id, index)
        done.set()

    def wake(self, tags: Iterable[str] = TAGS) -> None:
        self._released -= {*self._checked_tags(tags)}

    @property
    def stats(self) -> EngineStats:
        return EngineStats(running=len(self._live))

    def close(self) -> None:
        if not self.owner.is_current:
            return
        self.gate.set()
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join()

    def crash(self) -> None:
        """Fail as an engine does whose device is gone."""
        self._failure = "ValueError('the device is gone')"
        with self._wake:
            self._closed = True
            self._wake.notify()

    @property
    def idle(self) -> bool:
        return not self._live and not self._inbox

    def _post(self, command: Callable[[], None]) -> None:
        with self._wake:
            if self._closed:
                raise EngineError("The engine has been closed.")
            self._inbox.append(command)
            self._wake.notify()

    def _add(self, request: Request) -> None:
        cached = self._cached_tokens(request.prompt)
        cached = 0 if request.params.reports_prompt else cached
        for i in range(request.params.n):
            self._live[request.request_id, i] = _Run(request, i, iter(self.script(request, i)), cached)

    def _cached_tokens(self, prompt: EncodedPrompt) -> int:
        """Tokens of the full pages that begin it and have been seen before; at least its last is computed."""
        key, cached = hash(prompt.salt), 0
        for start in range(0, len(prompt) - PAGE_SIZE + 1, PAGE_SIZE):
            stop = start + PAGE_SIZE
            key = hash((key, tuple(prompt.ids[start:stop]), prompt.content(start, stop)))
            if key in self._pages and stop < len(prompt):
                cached = stop
            self._pages.add(key)
        return cached

    def _abort(self, request_id: int, index: int | None) -> None:
        for key in [k for k in self._live if k[0] == request_id and index in (None, k[1])]:
            run = self._live.pop(key)
            run.request.tell(StepOutput(*key, finish_reason="abort"))

    def _loop(self) -> None:
        while self._take():
            if not self.gate.is_set():
                continue  # commands alone
            for key, run in list(self._live.items()):
                out = run.step()
                if out.finish_reason:
                    del self._live[key]
                run.request.tell(out)
        for key, run in list(self._live.items()):
            out = StepOutput(*key, finish_reason="abort")
            if self._failure:
                out.finish_reason, out.error = "error", EngineError(f"The engine failed: {self._failure}")
            run.request.tell(out)
        self._live.clear()

    def _take(self) -> bool:
        with self._wake:
            while not (self._inbox or self._closed or (self._live and self.gate.is_set())):
                self._wake.wait(0.002)
            commands = [self._inbox.popleft() for _ in range(len(self._inbox))]
        for command in commands:
            command()
        time.sleep(STEP)
        return not self._closed


class _Run:
    def __init__(self, request: Request, index: int, tokens: Iterable[int], cached: int) -> None:
        self.request, self.index, self.tokens, self.count = request, index, iter(tokens), 0
        self.cached = cached

    def step(self) -> StepOutput:
        params = self.request.params
        out = StepOutput(self.request.request_id, self.index, cached_tokens=self.cached)
        try:
            token = next(self.tokens)
        except Exception as error:
            out.finish_reason, out.error = "error", error
            return out
        self.count += 1
        out.token_ids = [token]
        self._report(out, token)
        if token in params.stop_token_ids:
            out.finish_reason, out.stop_token = "stop", token
        elif self.count >= params.max_new_tokens:
            out.finish_reason = "length"
        return out

    def _report(self, out: StepOutput, token: int) -> None:
        """Log-probabilities and rows that name their token."""
        params = self.request.params
        if params.logprobs is not None:
            out.logprobs = [TokenLogprobs(-float(token), {7: -0.5})]
        if params.prompt_logprobs is not None and self.count == 1:
            rest = [TokenLogprobs(-float(i), {}) for i in self.request.prompt.ids[1:]]
            out.prompt_logprobs = [None, *rest]
        if params.logits:
            out.logits = np.full((1, WIDTH), token, np.float32)
        if params.hidden:
            out.hidden = np.full((1, WIDTH), -token, np.float32)
