"""The pieces of several prompts' answers, as they come."""

from __future__ import annotations

import logging
import queue
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from lmdeploy_jax.errors import EngineError, RequestConflictError, RequestError
from lmdeploy_jax.messages import GenerationConfig, Response
from lmdeploy_jax.preprocessing import Encode, PreprocessingThreads
from lmdeploy_jax.session import Session, Turn

if TYPE_CHECKING:
    from lmdeploy_jax.arguments import Arguments, PromptRequest
    from lmdeploy_jax.engine.io.frontend import Frontend, PromptOptions
    from lmdeploy_jax.prompt import EncodedPrompt

failures = logging.getLogger("lmdeploy_jax.failures")  # of its own, for who tells of them otherwise


def log_failure(answer: Response, error: BaseException | None = None) -> None:
    """One line in the log: an answer that failed has no text, and who prints its text sees nothing.

    error: what became the answer; told with its place in the code where it is none that a prompt can cause.
    """
    unexpected = error if error is not None and not isinstance(error, RequestError) else None
    failures.warning("prompt %d failed: %s", answer.index, answer.error_message, exc_info=unexpected)


class ResponseStream:
    """Iterates over pieces in the order in which they come; `.index` tells the prompt, `.choice` the answer.

    What is still running when it is closed, left by an exception or garbage collected is aborted.
    """

    def __init__(self, frontend: Frontend, *, stream: bool = True) -> None:
        self._frontend = frontend
        self._stream = stream
        self._pieces: queue.SimpleQueue[Response | Exception] = queue.SimpleQueue()
        self._left: dict[int, int] = {}  # answers that have not ended, of each prompt
        self._requests: dict[int, int] = {}
        self._sessions: dict[int, Session] = {}
        self._aborted: set[int] = set()  # before they were submitted
        self._threads: PreprocessingThreads | None = None

    def expect(self, index: int, config: GenerationConfig, session: Session | None = None) -> None:
        """Count on a prompt's answers, which `submit` starts. Raises RequestConflictError."""
        if session is not None:
            session.begin(_aborter(weakref.ref(self), index))
            self._sessions[index] = session
        self._left[index] = config.n

    def submit(self, index: int, prompt: EncodedPrompt, config: GenerationConfig) -> None:
        """Start a prompt's answers. Raises what `Frontend.submit` does."""
        request = self._frontend.submit(prompt, config, self._pieces.put, index=index, stream=self._stream)
        self._requests[index] = request
        if index in self._aborted or index not in self._left:
            self._frontend.abort(request)

    def prepare_in_threads(self, requests: Sequence[tuple[int, PromptRequest]], encode: Encode) -> None:
        """Submit prompts as threads have encoded them."""
        running = weakref.ref(self)

        def deliver(index: int, request: PromptRequest, encoded: EncodedPrompt | BaseException) -> bool:
            stream = running()
            if stream is not None:
                stream.take(index, request, encoded)
            return stream is not None

        self._threads = PreprocessingThreads(requests, encode, deliver)

    def take(self, index: int, request: PromptRequest, encoded: EncodedPrompt | BaseException) -> None:
        """Submit a prompt, or let what it raised become its answer; what no prompt can cause is raised to who
        reads the pieces.
        """
        try:
            if isinstance(encoded, BaseException):
                raise encoded
            self.submit(index, encoded, request.config)
        except BaseException as error:  # a panic of a library in Rust too: somebody waits for the answer
            if isinstance(error, EngineError):
                self._pieces.put(error)
            else:
                self.add(index, error)

    def add(self, index: int, error: BaseException) -> None:
        """Put in the whole answer to a prompt that could not be submitted because of `error`."""
        from lmdeploy_jax.engine.io.answer import error_response

        piece = error_response(error, index)
        log_failure(piece, error)
        self._left[index] = 1
        self._pieces.put(piece)

    @property
    def answers_left(self) -> int:
        return sum(self._left.values())

    def abort(self, index: int) -> None:
        """End one prompt's answers; their last pieces still come."""
        self._aborted.add(index)
        if index in self._requests:
            self._frontend.abort(self._requests[index])

    def close(self) -> None:
        """Abort what is still running and drop its pieces."""
        if self._threads is not None:
            self._threads.close()
        for index in list(self._left):
            self.abort(index)
            self._forget(index)

    def __iter__(self) -> Iterator[Response]:
        return self

    def __next__(self) -> Response:
        while self._left:
            piece = self._pieces.get()
            if isinstance(piece, Exception):
                raise piece
            if piece.index in self._left:
                self._count(piece)
                return piece
        raise StopIteration

    def __enter__(self) -> ResponseStream:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def _count(self, piece: Response) -> None:
        if piece.finish_reason is not None:
            if piece.finish_reason == "error" and piece.index in self._requests:
                log_failure(piece)
            self._left[piece.index] -= 1
            if not self._left[piece.index]:
                self._forget(piece.index)

    def _forget(self, index: int) -> None:
        self._left.pop(index, None)
        self._requests.pop(index, None)
        if self._threads is not None:
            self._threads.release(index)
        session = self._sessions.pop(index, None)
        if session is not None:
            session.end()


def _aborter(stream: weakref.ref[ResponseStream], index: int) -> Callable[[], None]:
    """How a session aborts its prompt, without keeping alive a stream that nobody reads."""

    def abort() -> None:
        running = stream()
        if running is not None:
            running.abort(index)

    return abort


def start(frontend: Frontend, call: Arguments, *, stream: bool) -> ResponseStream:
    """Submit each prompt as soon as it is encoded; one that cannot be served becomes an answer."""
    running, encode = ResponseStream(frontend, stream=stream), partial(_encode, frontend, call.options)
    try:
        requests = list(enumerate(call.requests))
        if len(requests) > 1 and any(_has_images(request) for _, request in requests):
            for index, request in requests:
                running.expect(index, request.config, request.session)
            running.prepare_in_threads(requests, encode)
        else:
            for index, request in requests:
                _submit(running, index, request, encode)
    except BaseException:
        running.close()
        raise
    return running


def _has_images(request: PromptRequest) -> bool:
    return not isinstance(request.prompt, RequestError) and request.prompt.has_images


def _encode(frontend: Frontend, options: PromptOptions, request: PromptRequest) -> EncodedPrompt:
    if isinstance(request.prompt, RequestError):
        raise request.prompt
    return frontend.encode(request.prompt, options)


def _submit(running: ResponseStream, index: int, request: PromptRequest, encode: Encode) -> None:
    try:
        encoded = encode(request)
        running.expect(index, request.config, request.session)
        running.submit(index, encoded, request.config)
    except (EngineError, RequestConflictError):
        raise
    except Exception as error:
        running.add(index, error)


def turn_pieces(session: Session, prompt: Turn, stream: ResponseStream) -> Iterator[Response]:
    """A turn's pieces; the session learns the answer when they end, or stop being read."""
    answer: Response | None = None
    try:
        with stream:
            for piece in stream:
                answer = replace(piece) if answer is None else answer.extend(piece)
                yield piece
        if answer is not None and answer.finish_reason in ("stop", "length"):
            session.history.append((prompt, answer.text))
    finally:
        session.response = answer


def with_progress_bar(stream: ResponseStream) -> Iterator[Response]:
    """The same pieces, with a progress bar that counts answers, in a notebook too."""
    from tqdm import tqdm  # not tqdm.auto, which asks a notebook without ipywidgets to install them

    with tqdm(total=stream.answers_left, desc="Answers", leave=False) as bar:
        for piece in stream:
            bar.update(piece.finish_reason is not None)
            yield piece
