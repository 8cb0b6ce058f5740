"""The engine's process: requests come in over a connection, everything that waits goes out in one message.

`remote.py` is the other side. Importing this module does not import JAX; running it does.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import queue
import signal
import threading
import time
import traceback
from collections import defaultdict, deque
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from lmdeploy_jax.config import JaxEngineConfig
from lmdeploy_jax.engine import garbage_collection
from lmdeploy_jax.engine.base import EngineBase
from lmdeploy_jax.engine.merged_output import MergedOutput
from lmdeploy_jax.engine.process.compiling import CompilingRequests
from lmdeploy_jax.engine.process.wire import (
    Abort,
    Call,
    Failed,
    Ready,
    Reply,
    RequestBody,
    State,
    Submit,
    Update,
    dumps,
    packed,
    portable,
    receive,
)
from lmdeploy_jax.engine.request import Request, StepOutput
from lmdeploy_jax.errors import EngineError, LmdeployError
from lmdeploy_jax.logs import logger, set_level
from lmdeploy_jax.prompt import EncodedPrompt

Build = Callable[[], EngineBase]
# The parent answers these for both, and lets running answers finish first.
IGNORED_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_POLL_SECONDS = 0.25  # seconds after which the state is looked at where nothing has happened
# Least seconds between two messages where the engine is on a CPU, for each running sequence and at most: what
# the server does for a message, stream by stream, takes cores away from it.
_INTERVAL_ON_CPU, _LONGEST_INTERVAL = 0.001, 0.04


def open_engine(model: str | Path, config: JaxEngineConfig, progress: bool) -> EngineBase:
    """The engine itself. Raises what `Engine` raises."""
    from lmdeploy_jax.engine.core.engine import Engine  # brings JAX

    return Engine(model, config, progress=progress)


def open_replica(rank: int, model: str | Path, config: JaxEngineConfig, progress: bool) -> EngineBase:
    """Copy `rank` of the engine, on its own GPUs where there are any. Raises what `Engine` raises."""
    from lmdeploy_jax.parallel.mesh import see_gpus_of_copy  # brings JAX

    see_gpus_of_copy(rank, config.tp)
    return open_engine(model, config, progress)


def run(connection: Connection, build: Build, level: int) -> None:
    """The process's main function: starts the engine and serves until the parent closes it, or is gone."""
    for number in IGNORED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    set_level(level)
    try:
        engine = build()
    except BaseException as error:
        connection.send_bytes(dumps(Failed(_explained(error))))
        return
    garbage_collection.freeze()
    Worker(engine, connection).serve()


def _end_with_parent() -> None:
    """Whatever the engine is doing then: nobody is left to want it."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _explained(error: BaseException) -> BaseException:
    """With the place where it was raised, where it was not raised for the user."""
    if not isinstance(error, LmdeployError | OSError):
        error.add_note("In the engine's process:\n" + "".join(traceback.format_exception(error)))
    return portable(error)


class Worker:
    """Carries out what the parent asks of an engine."""

    def __init__(self, engine: EngineBase, connection: Connection) -> None:
        self._engine = engine
        self._connection = connection
        self._outbox = Outbox(engine, connection)
        self._compiling = CompilingRequests(engine)

    def serve(self) -> None:
        """Until the parent says that it is enough."""
        with suppress(EOFError, OSError):
            while (message := receive(self._connection)) is not None:
                self._handle(message)
        self._compiling.close()
        self._engine.close()
        self._outbox.close()

    def _handle(self, message: Any) -> None:
        match message:
            case Submit():
                self._submit(message)
            case Abort():
                self._abort(message)
            case Call():
                self._outbox.put(Reply(message.number, self._error_of(message)))

    def _submit(self, message: Submit) -> None:
        try:
            body: RequestBody = pickle.loads(message.body)
            prompt, params, streams, arrival, grammar = body
            encoded = EncodedPrompt(*prompt)
            request = Request(encoded, params, self._outbox.put, streams, message.request_id, arrival)
            if grammar is not None:
                self._compiling.submit(request, grammar)
            else:
                self._engine.submit(request)
        except Exception as error:  # what the parent could not know: it has fallen asleep, or ended
            for i in range(message.n):
                out = StepOutput(message.request_id, i, finish_reason="error", error=portable(error))
                self._outbox.put(out)

    def _abort(self, message: Abort) -> None:
        if not self._compiling.abort(message.request_id, message.sequence):
            with suppress(EngineError):  # it has ended with the engine
                self._engine.abort(message.request_id, message.sequence)

    def _error_of(self, call: Call) -> BaseException | None:
        try:
            getattr(self._engine, call.method)(*call.args)
        except Exception as error:
            return portable(error)
        return None


class Outbox:
    """What is told to the parent. The engine's thread only puts it down; a thread of its own sends it."""

    def __init__(self, engine: EngineBase, connection: Connection) -> None:
        self._engine = engine
        self._connection = connection
        self._waiting: queue.SimpleQueue[StepOutput | Reply | None] = queue.SimpleQueue()
        self._steps: deque[int] = deque()  # wakes nobody: outputs follow, or the next poll takes them along
        engine.on_step = self._steps.append
        self.put = self._waiting.put
        self._sent_state = self._state
        self._interval = _INTERVAL_ON_CPU if engine.facts.on_cpu else 0.0
        self._due = 0.0  # on the monotonic clock: when the next message may go
        self._open = True
        connection.send_bytes(dumps(Ready(engine.facts, self._sent_state)))
        self._thread = threading.Thread(target=self._run, name="lmdeploy_jax sender", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Send what waits, then stop."""
        self._waiting.put(None)
        self._thread.join()

    @property
    def _state(self) -> State:
        return State(self._engine.stats, self._engine.sleeping, self._engine.failure)

    def _run(self) -> None:
        try:
            while self._open:
                update = self._collected()
                if update.outputs or update.replies or update.steps or update.state != self._sent_state:
                    self._connection.send_bytes(dumps(update))
                    self._sent_state = update.state
        except OSError:
            pass  # the parent has gone
        except Exception:
            logger.exception("the engine's process ends, since it can tell nothing more")
            os._exit(1)

    def _collected(self) -> Update:
        """Everything that waits, the outputs of a sequence as one; after a while, nothing."""
        outputs: defaultdict[tuple[int, int], MergedOutput] = defaultdict(MergedOutput)
        replies = []
        with suppress(queue.Empty):
            item = self._waiting.get(timeout=_POLL_SECONDS)
            time.sleep(max(self._due - time.monotonic(), 0.0))
            while item is not None:
                if isinstance(item, Reply):
                    replies.append(item)
                else:
                    outputs[item.request_id, item.index].add(item)
                item = self._waiting.get_nowait()
            self._open = False
        state = self._state
        self._due = time.monotonic() + min(self._interval * state.stats.running, _LONGEST_INTERVAL)
        steps = [self._steps.popleft() for _ in range(len(self._steps))]
        return Update(state, [packed(out.result()) for out in outputs.values()], replies, steps)
