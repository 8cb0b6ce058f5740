"""LMDeploy's own: POST /generate and /get_ppl."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator

import orjson
from fastapi import APIRouter, Request
from starlette.responses import Response as HttpResponse

from lmdeploy_jax.errors import LogitsError
from lmdeploy_jax.messages import GenerationConfig, Response
from lmdeploy_jax.pipeline import cross_entropy
from lmdeploy_jax.server.errors import ApiError, failed_answer
from lmdeploy_jax.server.generation import Generation, Job
from lmdeploy_jax.server.http.sse import EventStream, cancel_on_disconnect, data, openai_events
from lmdeploy_jax.server.ids import new_id
from lmdeploy_jax.server.native.answer import answer_body
from lmdeploy_jax.server.native.bodies import GenerateRequest, PerplexityRequest
from lmdeploy_jax.server.routing import CurrentService, JsonRoute, check_fields
from lmdeploy_jax.server.service import Service

router = APIRouter(tags=["native"], route_class=JsonRoute)
REFUSED = {
    "image_data": "images are not supported.",
    "return_routed_experts": "routed experts are not reported.",
}


@router.post("/generate", response_model=None)
async def generate(body: GenerateRequest, request: Request, service: CurrentService) -> HttpResponse:
    """Continue a text or token ids. A stream's events hold what is new since the last one."""
    check_fields(service, body, REFUSED)
    if (body.prompt is None) == (body.input_ids is None):
        raise ApiError(400, "Give exactly one of prompt and input_ids.", param="prompt")
    given = body.sampling() | {"logprobs": 0 if body.return_logprob else None}
    config = service.defaults.config(given)
    generation = await cancel_on_disconnect(request, _begun(service, _given(body), config, body))
    if body.stream:
        return EventStream(openai_events(_events(generation, config)), generation.close)
    (whole,) = await cancel_on_disconnect(request, _all(generation))
    return HttpResponse(orjson.dumps(answer_body(whole, config)), media_type="application/json")


def _given(body: GenerateRequest) -> str | list[int]:
    return body.prompt if body.prompt is not None else body.input_ids or []


async def _begun(
    service: Service, prompt: str | list[int], config: GenerationConfig, body: GenerateRequest
) -> Generation:
    def prepare() -> list[Job]:
        return [Job(service.frontend.encode_raw(prompt), config)]

    name = new_id("gen")
    generation = await service.generate(prepare, stream=body.stream, name=name, session_id=body.session_id)
    await generation.begin()
    return generation


async def _all(generation: Generation) -> list[Response]:
    """Complete answers."""
    try:
        return [piece async for pieces in generation for piece in pieces]
    finally:
        generation.close()


async def _events(generation: Generation, config: GenerationConfig) -> AsyncGenerator[bytes, None]:
    async for pieces in generation:
        for piece in pieces:
            yield data(answer_body(piece, config))


@router.post("/get_ppl")
async def get_ppl(body: PerplexityRequest, request: Request, service: CurrentService) -> dict[str, float]:
    """The mean cross-entropy of the input's tokens after its first, in nats (LMDeploy's `ppl`)."""
    check_fields(service, body)
    if not body.input:
        raise ApiError(400, "Input must not be empty.", param="input")
    return {"ppl": await cancel_on_disconnect(request, _perplexity(service, body.input))}


async def _perplexity(service: Service, given: str | list[int]) -> float:
    config = GenerationConfig(max_new_tokens=1, prompt_logprobs=0, ignore_eos=True)
    jobs: list[Job] = []

    def prepare() -> list[Job]:
        prompt = service.frontend.encode_raw(given)
        if len(prompt) < 2:
            raise ApiError(400, f"input has {len(prompt)} tokens; at least 2 are needed.", param="input")
        jobs.append(Job(prompt, config))
        return jobs

    (answer,) = await _all(await service.generate(prepare, stream=False))
    if answer.finish_reason == "error":
        raise failed_answer(answer.error_code, answer.error_message)
    loss = cross_entropy(jobs[0].prompt.ids, answer)
    if not math.isfinite(loss):
        raise LogitsError(f"The cross-entropy is {loss}: the model gives no distribution for this text.")
    return loss
