"""Requests whose grammars are compiled first, beside the thread that receives what the parent says."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lmdeploy_jax.engine.base import EngineBase
from lmdeploy_jax.engine.request import Request, StepOutput

if TYPE_CHECKING:
    from lmdeploy_jax.guided.grammars import Grammars

# llguidance compiles without the interpreter's lock. Several, so that a dear grammar holds no other up.
_THREADS = 4


@dataclass
class _Waiting:
    request: Request
    aborted: list[int] = field(default_factory=list)  # sequences that are to end as soon as there are any


class CompilingRequests:
    """Compiles grammars in a few threads and passes the requests on to the engine. Any thread may call."""

    def __init__(self, engine: EngineBase) -> None:
        self._engine = engine
        self._grammars: Grammars | None = None  # llguidance is loaded with the first grammar
        self._waiting: dict[int, _Waiting] = {}
        self._lock = threading.Lock()  # a request is either here or with the engine, whoever aborts it
        self._loading = threading.Lock()
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="lmdeploy_jax grammars")

    def submit(self, request: Request, source: tuple[str, int]) -> None:
        """Submit the request with a grammar, given as the fields of its `Source`, once that is compiled."""
        with self._lock:
            self._waiting[request.request_id] = _Waiting(request)
        if self._grammars is not None and self._grammars.has(source[0]):
            self._compile(request, source)
        else:
            self._threads.submit(self._compile, request, source)

    def abort(self, request_id: int, index: int | None) -> bool:
        """As `EngineBase.abort`, for a request that is still here; False for any other."""
        with self._lock:
            if request_id not in self._waiting:
                return False
            if index is not None:
                self._waiting[request_id].aborted.append(index)
                return True
            request = self._waiting.pop(request_id).request
        for i in range(request.params.n):
            request.tell(StepOutput(request_id, i, finish_reason="abort"))
        return True

    def close(self) -> None:
        """What is still here is not told of: the parent knows that its engine ends."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _compile(self, request: Request, source: tuple[str, int]) -> None:
        try:
            request.params = request.params.with_grammar(self._load().compiled(source))
        except BaseException as error:  # a panic of a library in Rust is no Exception
            self._pass_on(request, error)
        else:
            self._pass_on(request, None)

    def _pass_on(self, request: Request, error: BaseException | None) -> None:
        with self._lock:
            waiting = self._waiting.pop(request.request_id, None)
            if waiting is None:  # it has been aborted
                return
            try:
                if error is not None:
                    raise error
                self._engine.submit(request)
                for index in waiting.aborted:
                    self._engine.abort(request.request_id, index)
            except BaseException as fault:  # what the parent could not know: it has fallen asleep, or ended
                request.refuse(fault)

    def _load(self) -> Grammars:
        from lmdeploy_jax.guided.grammars import Grammars
        from lmdeploy_jax.text.tokenizer import Tokenizer

        with self._loading:
            if self._grammars is None:
                tokenizer = Tokenizer(self._engine.folder, self._engine.config.trust_remote_code)
                self._grammars = Grammars(tokenizer, self._engine.vocab_size)
            return self._grammars
