"""The engine as the routes see it: what is admitted, what runs, and how the server goes down."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from lmdeploy_jax.engine.io.sampling_defaults import SamplingDefaults
from lmdeploy_jax.messages import GenerationConfig
from lmdeploy_jax.server.chat.answers import Answers
from lmdeploy_jax.server.chat.call import ChatCall
from lmdeploy_jax.server.chat.formats import parser_names, select_parsers
from lmdeploy_jax.server.chat.prepare import Chat
from lmdeploy_jax.server.errors import ApiError
from lmdeploy_jax.server.generation import Generation, PieceQueue
from lmdeploy_jax.server.ids import ToolCallIds
from lmdeploy_jax.server.metrics import Metrics, RequestMetrics
from lmdeploy_jax.server.options import ServerOptions
from lmdeploy_jax.text.parsers import json_formats

if TYPE_CHECKING:
    from lmdeploy_jax.engine.io.frontend import Frontend

logger = logging.getLogger("lmdeploy_jax")
MOST_ANSWERS = 1 << 17  # of a request, each of which takes kilobytes: a body of 16 MB could name millions


@dataclass(frozen=True)
class _Entry:
    """What is known of a generation that runs."""

    answers: int
    name: str | None  # the id that the client sees
    session_id: int | str | None  # the client's own


class Service:
    """A frontend with the server's options. All methods belong to one event loop's thread.

    model: the served model's name. Raises `ConfigError` for options that name nothing, such as an unknown
    parser.
    """

    def __init__(
        self, frontend: Frontend, options: ServerOptions | None = None, model: str = "model"
    ) -> None:
        self.options = options or ServerOptions()
        self.frontend = frontend
        self.models = (self.options.model_name or model,)
        self.created = int(time.time())
        self.defaults = SamplingDefaults.read(self.options.generation_config, frontend.engine.folder)
        self.media_access = self.options.media_access
        self.chat = Chat(frontend, *select_parsers(self.options, frontend.template), self.media_access)
        names = parser_names(self.options, frontend.template)
        logger.info("tool calls are read as %r, reasoning as %r", *names)
        self.metrics = (
            None
            if self.options.disable_metrics
            else Metrics(frontend.engine, self.models[0], lambda: self.running)
        )
        self.call_ids = ToolCallIds(bare=self.chat.tools is json_formats.MISTRAL)
        self.unknown_fields: set[str] = set()
        self.draining = False
        self._queue: PieceQueue | None = None
        self._live: dict[Generation, _Entry] = {}
        self.running = 0  # answers that have been asked for and are not finished

    # -- requests -----------------------------------------------------------------------------------------

    def check_model(self, name: str | None) -> str:
        """The served model's name. Raises `ApiError` 404 for another one; None and "" mean the served one."""
        if name and name not in self.models:
            known = ", ".join(self.models)
            raise ApiError(
                404,
                f"The model {name!r} does not exist. Served is {known}.",
                param="model",
                code="model_not_found",
            )
        return name or self.models[0]

    async def answer(
        self, call: ChatCall, *, stream: bool, name: str | None = None, session_id: int | str | None = None
    ) -> Answers:
        """The answers to a chat call, once their first pieces have come, so that faults before have a status.

        name, session_id: by which they can be aborted. Raises `ApiError` where nothing is taken in, and what
        `Chat.prepare` and the engine raise.
        """
        generation = self.admit(call.config.n, name=name, session_id=session_id)
        submit = partial(self.chat.submit, call, generation, stream=stream)
        reader = await generation.start(submit, images=call.prompt.has_images)
        return Answers(generation, reader)

    async def generate(
        self,
        prompts: Sequence[str | list[int]],
        config: GenerationConfig,
        *,
        stream: bool,
        name: str | None = None,
        session_id: int | str | None = None,
        cache_salt: str = "",
    ) -> Generation:
        """What continues texts as they are, or prompts in tokens; otherwise as `answer`."""
        generation = self.admit(config.n * len(prompts), name=name, session_id=session_id)
        submit = generation.submit_prompts
        await generation.start(partial(submit, prompts, config, stream=stream, cache_salt=cache_salt))
        return generation

    def admit(
        self, answers: int, *, name: str | None = None, session_id: int | str | None = None
    ) -> Generation:
        """Room for so many answers; who gets it must `start` it. Raises `ApiError` where there is none."""
        self._check_room(answers)
        metrics = None if self.metrics is None else RequestMetrics(self.metrics)
        generation = Generation(self.frontend, self._piece_queue(), self._forget, metrics)
        self._live[generation] = _Entry(answers, name, session_id)
        self.running += answers
        if self.options.request_timeout is not None:
            generation.expire_after(self.options.request_timeout)
        return generation

    def _check_room(self, answers: int) -> None:
        if self.draining:
            raise ApiError(503, "The server is shutting down.", code="shutting_down")
        if answers > MOST_ANSWERS:
            raise ApiError(
                400, f"The request asks for {answers} answers; at most {MOST_ANSWERS}. Send several requests."
            )
        failure = self.frontend.engine.failure
        if self.sleeping:
            message = "Engine is sleeping; call POST /wakeup before inference."
            raise ApiError(503, message, code="sleeping")
        if failure is not None:
            raise ApiError(503, f"The engine has failed: {failure}.", code="engine_unavailable")
        limit = self.options.max_queued_requests
        if limit is not None and self.running + answers > self.frontend.engine.max_batch_size + limit:
            message = f"The server is busy: {self.running} answers are under way or waiting. Try again later."
            raise ApiError(429, message, code="queue_full", headers={"retry-after": "1"})

    def _piece_queue(self) -> PieceQueue:
        if self._queue is None:
            self._queue = PieceQueue(asyncio.get_running_loop())
        return self._queue

    def _forget(self, generation: Generation) -> None:
        self.running -= self._live.pop(generation).answers

    def abort(
        self, *, name: str | None = None, session_id: int | str | None = None, everything: bool = False
    ) -> int:
        """End the generations of a name or session, or all; returns how many.

        Each answer still gets its last piece, with finish_reason "abort".
        """
        named = [
            generation
            for generation, entry in self._live.items()
            if everything
            or (name is not None and entry.name == name)
            or (session_id is not None and entry.session_id == session_id)
        ]
        for generation in named:
            generation.abort()
        return len(named)

    # -- sleep --------------------------------------------------------------------------------------------

    @property
    def sleeping(self) -> bool:
        return self.frontend.engine.sleeping

    async def sleep(self, level: int) -> None:
        """See `EngineBase.sleep`. What runs is aborted."""
        await asyncio.to_thread(self.frontend.engine.sleep, level)

    async def wake(self, tags: Sequence[str]) -> None:
        """See `EngineBase.wake`."""
        await asyncio.to_thread(self.frontend.engine.wake, tags)

    # -- going down ---------------------------------------------------------------------------------------

    def drain(self) -> None:
        """Take in nothing more. What runs goes on."""
        self.draining = True

    @property
    def health(self) -> tuple[str, str]:
        """ "healthy", "unhealthy" or "draining", and what there is to say about it."""
        failure = self.frontend.engine.failure
        if failure is not None:
            return "unhealthy", f"The engine has failed: {failure}."
        if self.draining:
            return "draining", "The server is shutting down."
        if self.sleeping:
            return "sleeping", "POST /wakeup wakes the engine up."
        return "healthy", "The engine takes requests."
