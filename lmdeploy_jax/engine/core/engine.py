"""The engine: a thread that schedules, dispatches and reads steps, one ahead of the device."""

from __future__ import annotations

import atexit
import logging
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from pathlib import Path

from lmdeploy_jax.cache.pages import DUMP_PAGE
from lmdeploy_jax.config import JaxEngineConfig
from lmdeploy_jax.engine.base import ASLEEP, TAGS, EngineBase
from lmdeploy_jax.engine.core.compile import CompileCounter
from lmdeploy_jax.engine.core.published import Sleep, Wake
from lmdeploy_jax.engine.core.results import accept, output_of, read_tokens
from lmdeploy_jax.engine.core.scheduler import DrainFirst
from lmdeploy_jax.engine.core.setup import set_up
from lmdeploy_jax.engine.core.sleep import SleepMode
from lmdeploy_jax.engine.core.step import Step
from lmdeploy_jax.engine.core.steps import Drawn
from lmdeploy_jax.engine.facts import EngineFacts, EngineStats
from lmdeploy_jax.engine.forks import OwnerProcess, claim_jax
from lmdeploy_jax.engine.nodes.settings import check_leads
from lmdeploy_jax.engine.request import Request, Sequence, StepOutput
from lmdeploy_jax.errors import EngineError, LogitsError
from lmdeploy_jax.messages import FinishReason
from lmdeploy_jax.sampling.repetition import NgramStop

log = logging.getLogger("lmdeploy_jax")
Outputs = list[tuple[Request, StepOutput]]
STEPS_IN_FLIGHT = 2  # a step is dispatched before the one ahead of it is read
_opened: weakref.WeakSet[Engine] = weakref.WeakSet()  # in this process


class Engine(EngineBase):
    """An engine in this process.

    Raises ConfigError, CheckpointError or UnsupportedModelError while it is set up.
    """

    def __init__(
        self, model: str | Path, config: JaxEngineConfig | None = None, *, progress: bool = True
    ) -> None:
        claim_jax()
        self.owner = OwnerProcess()
        config = config or JaxEngineConfig()
        check_leads(config)
        _tell_of_others()
        self._compilations = CompileCounter()
        parts = set_up(model, config, progress=progress)
        self.facts = EngineFacts(
            folder=parts.folder,
            config=config,
            model_config=parts.model_config,
            session_len=parts.session_len,
            max_batch_size=parts.buckets.max_batch_size,
            num_pages=parts.scheduler.cache.pool.capacity,
            cache_layout=parts.cache_layout,
            startup=parts.startup,
            on_cpu=parts.on_cpu,
        )
        self.memory = parts.memory
        self.scheduler = parts.scheduler
        self._runner = parts.runner
        self._nodes = parts.nodes
        self._sleep_mode = SleepMode(parts.runner, parts.scheduler, parts.reload)
        self._sequences: dict[int, list[Sequence]] = {}  # live sequences of each request
        self._flight: deque[Drawn] = deque()
        self._inbox: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._closed = False
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._loop, name="lmdeploy_jax engine", daemon=True)
        self._thread.start()
        _opened.add(self)
        atexit.register(self.close)  # a thread inside XLA while the interpreter goes down aborts the process

    # -- any thread ---------------------------------------------------------------------------------------

    def submit(self, request: Request) -> None:
        self._check(request)
        self._post(lambda: self._add(request))

    def abort(self, request_id: int, index: int | None = None) -> None:
        if not self._closed and self.owner.is_current:
            self._post(lambda: self._abort(request_id, index))

    def sleep(self, level: int = 1) -> None:
        self._check_level(level)
        self._call(lambda: self._sleep(level))

    def wake(self, tags: Iterable[str] = TAGS) -> None:
        known = self._checked_tags(tags)
        self._call(lambda: self._wake_up(known))

    @property
    def sleeping(self) -> bool:
        return bool(self._sleep_mode.released)

    def close(self) -> None:
        if not self.owner.is_current:
            return
        atexit.unregister(self.close)
        with self._wake:
            self._closed = True
            self._wake.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    @property
    def failure(self) -> str | None:
        if self._nodes.failure is not None:
            return self._nodes.failure
        if self._failure is not None:
            return repr(self._failure)
        return "it has been closed" if self._closed else None

    @property
    def stats(self) -> EngineStats:
        scheduler = self.scheduler
        images = scheduler.encoder_cache
        return EngineStats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            pages_used=scheduler.cache.pool.used,
            preemptions=scheduler.preemptions,
            encoder_cache_queries=0 if images is None else images.queries,
            encoder_cache_hits=0 if images is None else images.hits,
            compilations=self._compilations.count,
            compile_seconds=self._compilations.seconds,
        )

    def _post(self, command: Callable[[], None]) -> None:
        self.owner.check()
        with self._wake:
            if self._closed:
                cause = f": {self._failure!r}" if self._failure else ""
                raise EngineError(f"The engine has been closed{cause}.") from self._failure
            self._inbox.append(command)
            self._wake.notify()

    def _call(self, work: Callable[[], None]) -> None:
        """Do something on the engine's thread and wait for it; raises what it raises."""
        done: Future[None] = Future()

        def command() -> None:
            try:
                work()
                done.set_result(None)
            except Exception as error:
                done.set_exception(error)

        self._post(command)
        done.result()

    # -- the engine's thread ------------------------------------------------------------------------------

    def _loop(self) -> None:
        try:
            while self._take_commands():
                self._advance()
        except BaseException as error:
            log.exception("the engine failed")
            self._failure = error
        self._shut_down()

    def _take_commands(self) -> bool:
        """Run what other threads asked for; sleeps while there is nothing to do. False once closed."""
        with self._wake:
            while not (self._inbox or self._closed or self._flight or self.scheduler.has_work):
                self._wake.wait()
            commands = list(self._inbox)
            self._inbox.clear()
            closed = self._closed
        for command in commands:
            command()
        return not closed

    def _advance(self) -> None:
        """Dispatch the next step if there is one, then read the oldest unless the device would run dry."""
        step = self._schedule()
        if step is not None:
            self._flight.append(self._dispatch(step))
        if self._flight and (step is None or len(self._flight) >= STEPS_IN_FLIGHT):
            self._read(self._flight.popleft())

    def _schedule(self) -> Step | None:
        while True:
            try:
                return self.scheduler.schedule()
            except DrainFirst:
                self._drain()

    def _drain(self) -> None:
        _tell(self._accept_all())

    def _dispatch(self, step: Step) -> Drawn:
        faults = self._begin(step.admitted)
        if self.on_step is not None:
            self.on_step(step.num_tokens)
        passed = self._runner.forward(step)
        for sequence, error in faults.items():  # the step is planned with them: they end once it is under way
            self._fail(sequence, error)
        draws = [draw for draw in step.sampled if not draw[0].finished] if faults else step.sampled
        if not any(sequence.matcher and sequence.unread > 1 for sequence, _ in draws):
            return self._runner.draw(draws, passed)
        # What a grammar allows next depends on the tokens under way: read them while the pass runs.
        outputs = self._accept_all()
        draws = [draw for draw in draws if not draw[0].finished]
        self._runner.begin_masks(draws)
        _tell(outputs)
        return self._runner.draw(draws, passed)

    def _begin(self, admitted: list[Sequence]) -> dict[Sequence, BaseException]:
        """Set up the slots of sequences that have one now; returns those that could not be."""
        faults: dict[Sequence, BaseException] = {}
        for sequence in admitted:
            sequence.request.note_admitted()
            try:
                self._runner.begin(sequence)
            except BaseException as error:
                log.exception("a sequence of request %d could not begin", sequence.request.request_id)
                faults[sequence] = error
        return faults

    def _accept_all(self) -> Outputs:
        outputs: Outputs = []
        while self._flight:
            outputs += self._accept(self._flight.popleft())
        return outputs

    def _read(self, drawn: Drawn) -> None:
        _tell(self._accept(drawn))

    def _accept(self, drawn: Drawn) -> Outputs:
        """Waits for a step's tokens and adds them to their sequences; what is to be told of them."""
        tokens, packed = read_tokens(drawn)
        outputs: Outputs = []
        for i, (sequence, _) in enumerate(drawn.draws):
            if sequence.finished:
                continue  # it ended while this token was under way
            if sequence in drawn.errors:
                self._fail(sequence, drawn.errors[sequence])
                continue
            accepted = accept(sequence, tokens[i], drawn.most, self.session_len)
            out = output_of(sequence, drawn, i, accepted, packed)
            if isinstance(out.error, LogitsError):
                self._runner.clear_pages([DUMP_PAGE, *self.scheduler.discard_cache(sequence)])
            if out.finish_reason:
                self._retire(sequence)
            outputs.append((sequence.request, out))
        return outputs

    def _sleep(self, level: int) -> None:
        for request_id in list(self._sequences):
            self._abort(request_id, None)
        self._drain()
        self._nodes.tell(Sleep(level))
        self._sleep_mode.sleep(level)

    def _wake_up(self, tags: tuple[str, ...]) -> None:
        self._nodes.tell(Wake(tags))
        self._sleep_mode.wake(tags)

    def _add(self, request: Request) -> None:
        if self.sleeping:  # since it was submitted
            request.refuse(EngineError(ASLEEP))
            return
        first = self.scheduler.add(request)
        sequences = self._sequences[request.request_id] = [first, *first.siblings]
        try:
            for sequence in sequences:
                self._watch(sequence)
        except BaseException as error:
            log.exception("request %d could not be taken in", request.request_id)
            self._fail(first, error)

    def _watch(self, sequence: Sequence) -> None:
        """Give it what looks at its tokens as they come."""
        params = sequence.params
        if params.ngram_size and params.ngram_threshold:
            sequence.ngram = NgramStop(params.ngram_size, params.ngram_threshold)
        if params.grammar is not None:
            sequence.matcher = params.grammar.matcher(params.stop_token_ids)

    def _abort(self, request_id: int, index: int | None) -> None:
        for sequence in list(self._sequences.get(request_id, ())):
            if index in (None, sequence.index):
                self._end(sequence, "abort")

    def _fail(self, sequence: Sequence, error: BaseException) -> None:
        self._end(sequence, "error", error)

    def _end(self, sequence: Sequence, reason: FinishReason, error: BaseException | None = None) -> None:
        """End a sequence between two tokens, and those that hang on its prompt."""
        for ending in (sequence, *sequence.siblings):
            if ending not in self._sequences.get(ending.request.request_id, ()):
                continue
            out = StepOutput(ending.request.request_id, ending.index, finish_reason=reason, error=error)
            out.cached_tokens = ending.cached
            self._retire(ending)
            ending.request.tell(out)

    def _retire(self, sequence: Sequence) -> None:
        if not sequence.finished:
            self.scheduler.finish(sequence)
        live = self._sequences[sequence.request.request_id]
        live.remove(sequence)
        if not live:
            del self._sequences[sequence.request.request_id]

    def _shut_down(self) -> None:
        """Tell every waiting listener; nothing may hang on an engine that has stopped."""
        with self._wake:
            self._closed = True
            commands = list(self._inbox)
            self._inbox.clear()
        for command in commands:
            command()
        for sequence in [s for live in self._sequences.values() for s in live]:
            out = StepOutput(sequence.request.request_id, sequence.index)
            if self._failure is None:
                out.finish_reason = "abort"
            else:
                out.finish_reason = "error"
                out.error = EngineError(f"The engine failed: {self._failure!r}")
            sequence.request.tell(out)
        self._sequences.clear()
        self._flight.clear()
        self._nodes.close(None if self._failure is None else repr(self._failure))


def _tell_of_others() -> None:
    """A cell that is run again opens its engine while the one before still has the GPU's memory."""
    if any(engine.failure is None and not engine.facts.on_cpu for engine in _opened):
        log.warning(
            "another engine is open in this process and keeps its part of the devices' memory; this one gets "
            "what is left. Close that one first, with close() or del, for a KV cache of full size"
        )


def _tell(outputs: Outputs) -> None:
    for request, out in outputs:
        request.tell(out)
