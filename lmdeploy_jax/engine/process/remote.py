"""An engine in a process of its own, seen from the process that uses it, which needs no JAX.

HTTP, tokenisers and detokenisers have this process's interpreter to themselves, the engine's thread the other
one. `worker.py` is the other side.
"""

from __future__ import annotations

import atexit
import itertools
import multiprocessing
import pickle
import queue
import signal
import threading
from collections.abc import Iterable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from lmdeploy_jax.config import JaxEngineConfig
from lmdeploy_jax.engine.base import TAGS, EngineBase
from lmdeploy_jax.engine.facts import EngineStats
from lmdeploy_jax.engine.forks import OwnerProcess
from lmdeploy_jax.engine.process.wire import (
    Abort,
    Call,
    Failed,
    Ready,
    Reply,
    RequestBody,
    Submit,
    Update,
    dumps,
    receive,
    unpacked,
)
from lmdeploy_jax.engine.process.worker import IGNORED_SIGNALS, open_engine, run
from lmdeploy_jax.engine.request import Request, StepOutput
from lmdeploy_jax.errors import EngineError, RequestError
from lmdeploy_jax.logs import logger

_EXIT_TIMEOUT = 20.0  # seconds for the engine's last step, before its process is killed
_CLOSED = "it has been closed"


class RemoteEngine(EngineBase):
    """Starts the engine in a new process and waits until it is ready.

    Raises what `Engine` raises there, EngineError if the process ends instead. The two processes end
    together, however either of them ends.
    """

    in_process = False

    def __init__(
        self,
        model: str | Path,
        config: JaxEngineConfig | None = None,
        *,
        progress: bool = True,
        build: Any = open_engine,
    ) -> None:
        self.owner = OwnerProcess()
        opened = partial(build, model, config or JaxEngineConfig(), progress)
        self._process, self._connection = _start(opened)
        self._live: dict[int, _Running] = {}
        self._calls: dict[int, Future[None]] = {}
        self._numbers = itertools.count()
        self._outgoing: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._lock = threading.Lock()  # nothing is entered in _live and _calls once nobody will look there
        self._closed = False
        self._exit: str | None = None  # how the process ended
        ready = self._first_message()
        self.facts, self._state = ready.facts, ready.state
        self._reader = self._thread(self._read, "reader")
        self._writer = self._thread(self._write, "writer")
        atexit.register(self.close)

    def _first_message(self) -> Ready:
        try:
            message = receive(self._connection)
        except EOFError:
            raise EngineError(f"The engine could not start: {self._reaped()}.") from None
        except BaseException:  # Ctrl-C
            self._process.kill()
            self._process.join()
            raise
        if isinstance(message, Failed):
            self._reaped()
            raise message.error
        assert isinstance(message, Ready)
        return message

    def _thread(self, work: Any, name: str) -> threading.Thread:
        thread = threading.Thread(target=work, name=f"lmdeploy_jax {name}", daemon=True)
        thread.start()
        return thread

    # -- any thread ---------------------------------------------------------------------------------------

    def submit(self, request: Request) -> None:
        self._check(request)
        message = _message(request)
        with self._lock:
            self._check_open()
            self._live[request.request_id] = _Running(request, set(range(request.params.n)))
        self._outgoing.put(message)

    def abort(self, request_id: int, index: int | None = None) -> None:
        if not self.owner.is_current:
            return
        self._outgoing.put(dumps(Abort(request_id, index)))

    def sleep(self, level: int = 1) -> None:
        self._call("sleep", level)

    def wake(self, tags: Iterable[str] = TAGS) -> None:
        self._call("wake", tuple(tags))

    @property
    def sleeping(self) -> bool:
        return self._state.sleeping

    @property
    def failure(self) -> str | None:
        return self._exit or (_CLOSED if self._closed else self._state.failure)

    @property
    def stats(self) -> EngineStats:
        """As the engine's process last told: with its latest outputs, or a moment after they changed. Nothing
        runs in one that has failed, whatever it told.
        """
        told = self._state.stats
        return told if self.failure is None else replace(told, running=0, waiting=0, pages_used=0)

    @property
    def unfinished(self) -> int:
        """Requests that were submitted and have not ended."""
        return len(self._live)

    def close(self) -> None:
        if not self.owner.is_current:
            return
        atexit.unregister(self.close)
        with self._lock:
            self._closed = True
        self._outgoing.put(None)
        self._reader.join(_EXIT_TIMEOUT)
        if self._reader.is_alive():
            logger.warning("the engine does not end: its process is killed")
            self._process.kill()
            self._reader.join()
        self._writer.join()
        self._connection.close()

    def _check_open(self) -> None:
        failure = self.failure
        if failure is not None:
            cause = "" if failure == _CLOSED else f": {failure}"
            raise EngineError(f"The engine has been closed{cause}.")

    def _call(self, method: str, *args: Any) -> None:
        """Have the engine do something and wait for it; raises what it raises."""
        self.owner.check()
        done: Future[None] = Future()
        number = next(self._numbers)
        with self._lock:
            self._check_open()
            self._calls[number] = done
        self._outgoing.put(dumps(Call(number, method, args)))
        done.result()

    # -- threads of its own -------------------------------------------------------------------------------

    def _write(self) -> None:
        """Sends what waits, so that nobody else ever waits for the other process to read."""
        with suppress(OSError):  # the process has ended; the reader sees to it
            while (message := self._outgoing.get()) is not None:
                self._connection.send_bytes(message)
            self._connection.send_bytes(dumps(None))

    def _read(self) -> None:
        try:
            while True:
                self._take(receive(self._connection))
        except (EOFError, OSError):
            how = self._reaped()
            self._end(self._state.failure or how)
        except Exception:
            logger.exception("what the engine's process says cannot be read")
            self._process.kill()
            self._end(self._reaped())

    def _take(self, update: Update) -> None:
        self._state = update.state
        for sent in update.outputs:
            self._deliver(unpacked(sent))
        for reply in update.replies:
            self._answer(reply)
        if self.on_step is not None:
            for tokens in update.steps:
                self.on_step(tokens)

    def _deliver(self, out: StepOutput) -> None:
        live = self._live[out.request_id]
        if out.finish_reason is not None:
            live.open.remove(out.index)
            if not live.open:
                del self._live[out.request_id]
        live.request.tell(out)

    def _answer(self, reply: Reply) -> None:
        with self._lock:
            done = self._calls.pop(reply.number)
        if reply.error is None:
            done.set_result(None)
        else:
            done.set_exception(reply.error)

    def _end(self, cause: str) -> None:
        """Tell everyone who waits; nothing may hang on a process that has ended."""
        with self._lock:
            if not self._closed:
                self._exit = cause
                logger.error("%s", cause)
            live, self._live = self._live, {}
            calls, self._calls = self._calls, {}
        error = EngineError(f"The engine failed: {self.failure}")
        for request_id, waiting in live.items():
            for index in waiting.open:
                out = StepOutput(request_id, index, finish_reason="abort")
                if self._exit is not None:
                    out.finish_reason, out.error = "error", error
                waiting.request.tell(out)
        for done in calls.values():
            done.set_exception(error)

    def _reaped(self) -> str:
        """How the process has ended, which it is given a while for."""
        self._process.join(_EXIT_TIMEOUT)
        if self._process.exitcode is None:
            self._process.kill()
            self._process.join()
        code = self._process.exitcode or 0
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        return f"the engine's process ended with {how}"


@dataclass
class _Running:
    """A request that runs, and which of its sequences have not ended."""

    request: Request
    open: set[int]


def _start(build: Any) -> tuple[BaseProcess, Connection]:
    """The process, and the connection to it."""
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    process = spawn.Process(target=run, args=(there, build, logger.level), name="lmdeploy_jax engine")
    resource_tracker.ensure_running()  # `start` would do it, and take the signals' mask away
    # The mask is inherited, so that there is no moment in which the signals would end the new process.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, IGNORED_SIGNALS)
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        there.close()  # else its end would not be the end of the connection
    return process, here


def _message(request: Request) -> bytes:
    """Raises RequestError where something of the request cannot leave this process."""
    params, grammar = request.params, request.params.grammar
    sent = params if grammar is None else params.with_grammar(None)
    source = None if grammar is None else (grammar.source.text, grammar.source.size)
    try:
        prompt: tuple[Any, ...] = (request.prompt.ids, request.prompt.spans, request.prompt.salt)
        if request.prompt.images:
            prompt += (request.prompt.images, request.prompt.rope)
        body = RequestBody(prompt, sent, request.streams, request.arrival, source)
        return dumps(Submit(request.request_id, params.n, dumps(body)))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise RequestError(f"The request cannot be sent to the engine's process: {error}") from error
