"""Requests to the engine whose pieces an event loop reads."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from lmdeploy_jax.messages import GenerationConfig, Response
from lmdeploy_jax.prompt import EncodedPrompt
from lmdeploy_jax.server.errors import ApiError, own_failure

if TYPE_CHECKING:
    from lmdeploy_jax.engine.io.frontend import Frontend
    from lmdeploy_jax.server.metrics import RequestMetrics

T = TypeVar("T")
# Threads that wait: until a form has been tried, until images have come. Apart from those that every other
# request needs for a moment.
_GUIDED = ThreadPoolExecutor(32, thread_name_prefix="lmdeploy_jax forms")
_IMAGES = ThreadPoolExecutor(64, thread_name_prefix="lmdeploy_jax images")


async def in_thread(work: Callable[[], T], *, images: bool = False) -> T:
    """The result of `work`, off the event loop. images: whether it loads any, and may wait for them."""
    return await asyncio.get_running_loop().run_in_executor(_IMAGES if images else None, work)


@dataclass(frozen=True)
class Job:
    """One prompt with its instructions, ready for the engine."""

    prompt: EncodedPrompt
    config: GenerationConfig


class PieceQueue:
    """From the engine's threads to the event loop: one wake-up for all pieces that come together."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._pieces: deque[tuple[Generation, Response]] = deque()

    def put(self, generation: Generation, piece: Response) -> None:
        """Called on an engine's thread; `flush` must follow."""
        self._pieces.append((generation, piece))

    def flush(self) -> None:
        """Called on an engine's thread after one or several pieces."""
        with suppress(RuntimeError):  # the loop has ended, and with it everyone who reads
            self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        while self._pieces:
            generation, piece = self._pieces.popleft()
            generation.deliver(piece)


class Generation:
    """A request that was admitted. Iterates over lists of pieces: all that have come since the last look.

    jobs: what was submitted, one a prompt. Pieces of one answer that wait together are one. `close` ends what
    still runs; so does the time limit, with an `ApiError`.
    """

    def __init__(
        self,
        frontend: Frontend,
        queue: PieceQueue,
        on_close: Callable[[Generation], None],
        metrics: RequestMetrics | None = None,
    ) -> None:
        self.jobs: Sequence[Job] = ()
        self._frontend = frontend
        self._queue = queue
        self._on_close = on_close
        self._metrics = metrics
        self._loop = asyncio.get_running_loop()
        self._requests: list[int] = []
        self._guided: Future[None] | None = None  # the submission of jobs whose forms are tried first
        self._unfinished = -1  # answers that have not ended; -1 until it is known
        self._inbox: list[Response] = []
        self._waiter: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._failure: ApiError | None = None
        self._closed = False

    async def start(self, work: Callable[[], T], *, images: bool = False) -> T:
        """The result of `work`, which makes jobs and submits them on a worker thread, once pieces have come.
        images: see `in_thread`.

        Both happen in one visit to that thread: of a burst of requests, the first is with the engine before
        the last one's prompt is tokenised. Raises what `work` raises, and `ApiError` where no answer comes.
        """
        try:
            result = await in_thread(work, images=images)
            if self._guided is not None:
                await asyncio.wrap_future(self._guided)
            self._unfinished = sum(job.config.n for job in self.jobs)
            await self._arrival()
            for piece in self._inbox:
                own_failure(piece)
        except BaseException:
            self.close()
            raise
        return result

    def submit_prompts(
        self,
        prompts: Sequence[str | list[int]],
        config: GenerationConfig,
        *,
        stream: bool,
        cache_salt: str = "",
    ) -> None:
        """Submit texts, as they are, and prompts in tokens. On a worker thread."""
        encode = self._frontend.encode_raw
        self.submit([Job(encode(prompt, cache_salt), config) for prompt in prompts], stream=stream)

    def submit(self, jobs: Sequence[Job], *, stream: bool) -> None:
        """Hand jobs to the engine, on a worker thread; another waits until their forms have been tried."""
        self.jobs = jobs
        if any(job.config.response_format is not None for job in jobs):
            self._guided = _GUIDED.submit(self._submit, jobs, stream)
        else:
            self._submit(jobs, stream)

    def _submit(self, jobs: Sequence[Job], stream: bool) -> None:
        for index, job in enumerate(jobs):
            if self._closed:  # meanwhile, by a client that has gone
                break
            request = self._frontend.submit(
                job.prompt, job.config, self._sink, index=index, stream=stream, flush=self._queue.flush
            )
            self._requests.append(request)
        if self._closed:  # `close` may have missed the last one
            self.abort()

    def _sink(self, piece: Response) -> None:
        self._queue.put(self, piece)

    def expire_after(self, seconds: float) -> None:
        """Give up after so long."""
        self._timer = self._loop.call_later(seconds, self._expire, seconds)

    def _expire(self, seconds: float) -> None:
        message = f"The request took longer than {seconds:g} s."
        self._failure = ApiError(504, message, code="request_timeout")
        self.abort()
        self._wake()

    def deliver(self, piece: Response) -> None:
        """A piece has come. On the event loop."""
        if self._metrics is not None:
            self._metrics.observe(piece)
        if not self._closed:
            self._inbox.append(piece)
            self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def _arrival(self) -> None:
        """Wait until a piece has come. Raises `ApiError` when there will be none."""
        if not self._inbox and self._failure is None:
            self._waiter = self._loop.create_future()
            await self._waiter
        if self._failure is not None:
            raise self._failure

    def __aiter__(self) -> Generation:
        return self

    async def __anext__(self) -> list[Response]:
        """Pieces that have come, at least one. Raises `ApiError` when the time is up."""
        if not self._unfinished:
            self.close()
            raise StopAsyncIteration
        await self._arrival()
        pieces, self._inbox = self._inbox, []
        self._unfinished -= sum(piece.finish_reason is not None for piece in pieces)
        return pieces if len(pieces) == 1 else merged(pieces)

    async def complete(self) -> list[Response]:
        """All that is still to come. For answers that were not streamed: each as one piece."""
        with closing(self):
            return [piece async for pieces in self for piece in pieces]

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
        if self._unfinished:
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
