"""Requests to the engine whose pieces an event loop reads."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lmdeploy_jax.messages import GenerationConfig, Response
from lmdeploy_jax.prompt import EncodedPrompt
from lmdeploy_jax.server.errors import ApiError, own_failure

if TYPE_CHECKING:
    from lmdeploy_jax.engine.io.frontend import Frontend
    from lmdeploy_jax.server.metrics import RequestMetrics

# Threads that wait until a form has been tried. Apart from those that every other request needs for a moment.
_GUIDED = ThreadPoolExecutor(32, thread_name_prefix="lmdeploy_jax forms")


@dataclass(frozen=True)
class Job:
    """One prompt with its instructions, ready for the engine."""

    prompt: EncodedPrompt
    config: GenerationConfig


class PieceQueue:
    """Brings pieces from the engine's side to the event loop: one wake-up for all that come together."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._pieces: deque[tuple[Generation, Response]] = deque()

    def post(self, generation: Generation, piece: Response) -> None:
        """Called on the engine's side; `flush` must follow."""
        self._pieces.append((generation, piece))

    def flush(self) -> None:
        """Called on the engine's side after one or several pieces."""
        with suppress(RuntimeError):  # the loop has ended, and with it everyone who reads
            self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        while self._pieces:
            generation, piece = self._pieces.popleft()
            generation.deliver(piece)


class Generation:
    """Iterates over lists of pieces: everything that has come since the last look.

    Pieces of one answer that wait together are one. `close` ends what still runs; so does the time limit,
    with an `ApiError`.
    """

    def __init__(
        self,
        frontend: Frontend,
        queue: PieceQueue,
        on_close: Callable[[Generation], None],
        meter: RequestMetrics | None = None,
    ) -> None:
        self._frontend = frontend
        self._mailroom = queue
        self._on_close = on_close
        self._meter = meter
        self._loop = asyncio.get_running_loop()
        self._requests: list[int] = []
        self._left = -1  # answers that have not ended; -1 until it is known
        self._inbox: list[Response] = []
        self._waiter: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._failure: ApiError | None = None
        self._closed = False

    async def start(self, prepare: Callable[[], Sequence[Job]], *, stream: bool) -> None:
        """Submit the jobs that `prepare` makes; both on a worker thread. Raises what they raise."""
        try:
            jobs, guided = await asyncio.to_thread(self._begin, prepare, stream)
            if guided:
                await self._loop.run_in_executor(_GUIDED, self._submit, jobs, stream)
            self._left = sum(job.config.n for job in jobs)
        except BaseException:
            self.close()
            raise

    def _begin(self, prepare: Callable[[], Sequence[Job]], stream: bool) -> tuple[Sequence[Job], bool]:
        """The jobs, and whether they are still to be submitted, since their forms have to be compiled."""
        jobs = prepare()
        guided = any(job.config.response_format is not None for job in jobs)
        if not guided:
            self._submit(jobs, stream)
        return jobs, guided

    def _submit(self, jobs: Sequence[Job], stream: bool) -> None:
        for index, job in enumerate(jobs):
            request = self._frontend.submit(
                job.prompt, job.config, self._sink, index=index, stream=stream, flush=self._mailroom.flush
            )
            self._requests.append(request)
            if self._closed:  # meanwhile, by a client that has gone; `close` may have missed this one
                self.abort()
                break

    def _sink(self, piece: Response) -> None:
        self._mailroom.post(self, piece)

    def expire_after(self, seconds: float) -> None:
        """Give up after so long."""
        self._timer = self._loop.call_later(seconds, self._expire, seconds)

    def _expire(self, seconds: float) -> None:
        self.fail(ApiError(504, f"The request took longer than {seconds:g} s.", code="request_timeout"))

    def fail(self, error: ApiError) -> None:
        """End with an error that the reader is told of."""
        self._failure = error
        self.abort()
        self._wake()

    def deliver(self, piece: Response) -> None:
        """A piece has come. On the event loop."""
        if self._meter is not None:
            self._meter.see(piece)
        if not self._closed:
            self._inbox.append(piece)
            self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def begin(self) -> None:
        """Wait for the first pieces. Raises `ApiError` if there will be none, or they tell why."""
        try:
            await self._come()
            for piece in self._inbox:
                own_failure(piece)
        except BaseException:
            self.close()
            raise

    async def _come(self) -> None:
        if not self._inbox and self._failure is None:
            self._waiter = self._loop.create_future()
            await self._waiter
        if self._failure is not None:
            raise self._failure

    def __aiter__(self) -> Generation:
        return self

    async def __anext__(self) -> list[Response]:
        """Pieces that have come, at least one. Raises `ApiError` when the time is up."""
        if not self._left:
            self.close()
            raise StopAsyncIteration
        await self._come()
        pieces, self._inbox = self._inbox, []
        self._left -= sum(piece.finish_reason is not None for piece in pieces)
        return pieces if len(pieces) == 1 else merged(pieces)

    def abort(self, choice: int | None = None) -> None:
        """End the answers, or one of the `n`; their last pieces still come."""
        for request in tuple(self._requests):
            self._frontend.abort(request, choice)

    def close(self) -> None:
        """End what still runs and forget it. May be called twice."""
        if self._closed:
            return
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        if self._left:
            self.abort()
        self._on_close(self)


def merged(pieces: Sequence[Response]) -> list[Response]:
    """One piece an answer, in the order in which they first came."""
    answers: dict[tuple[int, int], Response] = {}
    for piece in pieces:
        key = piece.index, piece.choice
        answers[key] = answers[key].extend(piece) if key in answers else piece
    return list(answers.values())


def named_stop(config: GenerationConfig, match: str | int | None) -> str | int | None:
    """The stop string or id, if it is one that the request has named."""
    named = match in (config.stop_words or ()) or match in (config.stop_token_ids or ())
    return match if named else None
