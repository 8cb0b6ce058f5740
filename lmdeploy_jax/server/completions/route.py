"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from functools import partial

import orjson
from fastapi import APIRouter, Request
from starlette.responses import Response

from lmdeploy_jax.messages import GenerationConfig
from lmdeploy_jax.server.completions.answer import CompletionShape, CompletionWriter
from lmdeploy_jax.server.completions.bodies import CompletionRequest
from lmdeploy_jax.server.completions.prompt import check, generation_config, prompts_of
from lmdeploy_jax.server.generation import Generation, Job
from lmdeploy_jax.server.http.sse import EventStream, cancel_on_disconnect, data, openai_events
from lmdeploy_jax.server.ids import new_id
from lmdeploy_jax.server.routing import CurrentService, JsonRoute, check_fields, now
from lmdeploy_jax.server.service import Service

router = APIRouter(tags=["completions"], route_class=JsonRoute)


@router.post("/v1/completions", response_model=None)
async def completions(body: CompletionRequest, request: Request, service: CurrentService) -> Response:
    """Continue texts as they are, without the chat template."""
    check_fields(service, body)
    check(body)
    model = service.check_model(body.model)
    work = _Work(body, service, model, generation_config(body, service.defaults))
    if body.stream:
        generation, writer = await cancel_on_disconnect(request, work.begun())
        include_usage = body.stream_options is not None and body.stream_options.include_usage
        return EventStream(openai_events(_chunks(generation, writer, include_usage)), generation.close)
    return Response(await cancel_on_disconnect(request, work.whole()), media_type="application/json")


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
        prompts = prompts_of(self.body)
        prepare = partial(_prepare, self.service, prompts, self.config, self.body.cache_salt or "", jobs)
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


def _prepare(
    service: Service,
    prompts: list[str | list[int]],
    config: GenerationConfig,
    cache_salt: str,
    jobs: list[Job],
) -> list[Job]:
    """On a worker thread."""
    encode = service.frontend.encode_raw
    jobs += [Job(encode(prompt, cache_salt), config) for prompt in prompts]
    return jobs


def _echo(service: Service, prompts: list[str | list[int]]) -> tuple[str, ...]:
    tokenizer = service.frontend.tokenizer
    return tuple(p if isinstance(p, str) else tokenizer.decode(p, skip_special_tokens=False) for p in prompts)
