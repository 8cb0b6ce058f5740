"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from functools import partial

import orjson
from fastapi import APIRouter, Request
from starlette.responses import Response

from lmdeploy_jax.messages import GenerationConfig
from lmdeploy_jax.server.completion_shape import CompletionShape, CompletionWriter
from lmdeploy_jax.server.errors import ApiError
from lmdeploy_jax.server.generation import Generation, Job
from lmdeploy_jax.server.protocol.completions import CompletionRequest
from lmdeploy_jax.server.routes.common import CurrentService, JsonRoute, check_fields, new_id, now
from lmdeploy_jax.server.service import Service
from lmdeploy_jax.server.sse import EventStream, data, openai_events, unless_gone

router = APIRouter(tags=["completions"], route_class=JsonRoute)
MOST_PROMPTS = 1024


@router.post("/v1/completions", response_model=None)
async def completions(body: CompletionRequest, request: Request, service: CurrentService) -> Response:
    """Continue texts as they are, without the chat template."""
    check_fields(service, body)
    _refuse(body)
    model = service.check_model(body.model)
    work = _Work(body, service, model, _config(body, service))
    if body.stream:
        generation, writer = await unless_gone(request, work.begun())
        include_usage = body.stream_options is not None and body.stream_options.include_usage
        return EventStream(openai_events(_chunks(generation, writer, include_usage)), generation.close)
    return Response(await unless_gone(request, work.whole()), media_type="application/json")


@dataclass
class _Work:
    """A request under way."""

    body: CompletionRequest
    service: Service
    model: str
    config: GenerationConfig

    async def begun(self) -> tuple[Generation, CompletionWriter]:
        """The generation, once its first pieces have come, so that faults before them have a status."""
        jobs: list[Job] = []
        prompts = _prompts(self.body)
        prepare = partial(_prepare, self.service, prompts, self.config, jobs)
        name = new_id("cmpl")
        generation = await self.service.generate(
            prepare,
            answers=self.config.n * len(prompts),
            stream=self.body.stream,
            name=name,
            session_id=self.body.session_id,
        )
        shape = CompletionShape(
            id=name,
            created=now(),
            model=self.model,
            tokenizer=self.service.frontend.tokenizer,
            jobs=jobs,
            top=self.body.logprobs,
            echo=_echo(self.service, prompts) if self.body.echo else None,
            only_prompt=self.body.length == 0,
        )
        await generation.begin()
        return generation, CompletionWriter(shape)

    async def whole(self) -> bytes:
        generation, writer = await self.begun()
        try:
            choices = [writer.choice(piece) async for pieces in generation for piece in pieces]
        finally:
            generation.close()
        choices.sort(key=lambda choice: choice["index"])
        return orjson.dumps(writer.body(choices, writer.usage))


async def _chunks(
    generation: Generation, writer: CompletionWriter, include_usage: bool
) -> AsyncGenerator[bytes, None]:
    async for pieces in generation:
        yield b"".join([data(writer.body([writer.choice(piece)])) for piece in pieces])
    if include_usage:
        yield data(writer.body([], writer.usage))


def _refuse(body: CompletionRequest) -> None:
    if body.suffix:
        message = "suffix is not supported: the models here continue a text, they do not fill in."
        raise ApiError(400, message, param="suffix", code="unsupported_field")
    if body.best_of is not None and body.best_of != body.n:
        message = "best_of is not supported: ask for n answers and their logprobs."
        raise ApiError(400, message, param="best_of", code="unsupported_field")
    if body.length == 0 and not body.echo:
        raise ApiError(400, "max_tokens: 0 needs echo: true, else there is no answer.", param="max_tokens")


def _config(body: CompletionRequest, service: Service) -> GenerationConfig:
    given = body.sampling() | {
        "n": body.n,
        "max_new_tokens": 1 if body.length == 0 else body.length,
        "logprobs": body.logprobs,
        "prompt_logprobs": body.logprobs if body.echo else None,
        "response_format": body.response_format and body.response_format.as_dict(),
    }
    return service.defaults.config(given)


def _prompts(body: CompletionRequest) -> list[str | list[int]]:
    prompt = body.prompt
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise ApiError(400, "prompt: give at least one text or one token.", param="prompt")
    if isinstance(prompt[0], int):
        return [prompt]  # type: ignore[list-item]
    if len(prompt) > MOST_PROMPTS:
        message = f"prompt: {len(prompt)} prompts are too many for one request; at most {MOST_PROMPTS}."
        raise ApiError(400, message, param="prompt")
    return list(prompt)  # type: ignore[arg-type]


def _prepare(
    service: Service, prompts: list[str | list[int]], config: GenerationConfig, jobs: list[Job]
) -> list[Job]:
    """On a worker thread."""
    encode = service.frontend.encode_text
    jobs += [Job(encode(p) if isinstance(p, str) else p, config) for p in prompts]
    return jobs


def _echo(service: Service, prompts: list[str | list[int]]) -> tuple[str, ...]:
    tokenizer = service.frontend.tokenizer
    return tuple(p if isinstance(p, str) else tokenizer.decode(p, skip_special_tokens=False) for p in prompts)
