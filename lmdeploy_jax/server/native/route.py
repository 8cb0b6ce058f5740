"""LMDeploy's own: POST /generate and /get_ppl."""

from __future__ import annotations

from functools import partial

import orjson
from fastapi import APIRouter
from starlette.responses import Response as HttpResponse

from lmdeploy_jax.engine.io.frontend import Frontend
from lmdeploy_jax.messages import GenerationConfig
from lmdeploy_jax.server.errors import ApiError, Dialect, register_dialect
from lmdeploy_jax.server.generation import Generation, Job
from lmdeploy_jax.server.http.sse import EventStream, openai_events
from lmdeploy_jax.server.ids import new_id
from lmdeploy_jax.server.native.answer import answer_body, events, mean_loss
from lmdeploy_jax.server.native.bodies import GenerateRequest, PerplexityRequest
from lmdeploy_jax.server.routing import CurrentService, JsonRoute, check_fields

router = APIRouter(tags=["native"], route_class=JsonRoute)
PERPLEXITY = GenerationConfig(max_new_tokens=1, prompt_logprobs=0, ignore_eos=True)
for path, prompt in {"/generate": "prompt", "/get_ppl": "input"}.items():
    register_dialect(path, Dialect(prompt=prompt))
REFUSED = {
    "image_data": "send parts of type image_url to /v1/chat/completions.",
}


@router.post("/generate", response_model=None)
async def generate(body: GenerateRequest, service: CurrentService) -> HttpResponse:
    """Continue a text or token ids. A stream's events hold what is new since the last one."""
    check_fields(service, body, REFUSED)
    if (body.prompt is None) == (body.input_ids is None):
        raise ApiError(400, "Give exactly one of prompt and input_ids.", param="prompt")
    given = body.sampling() | {
        "logprobs": 0 if body.return_logprob else None,
        "response_format": body.form(),
        "return_routed_experts": body.return_routed_experts,
    }
    config = service.defaults.config(given)
    prompt = body.prompt if body.prompt is not None else body.input_ids or []
    id, stream = new_id("gen"), body.stream
    generation = await service.generate([prompt], config, stream=stream, name=id, session_id=body.session_id)
    if stream:
        return EventStream(openai_events(events(generation, config)), generation.close)
    (whole,) = await generation.complete()
    return HttpResponse(orjson.dumps(answer_body(whole, config)), media_type="application/json")


@router.post("/get_ppl")
async def get_ppl(body: PerplexityRequest, service: CurrentService) -> dict[str, float]:
    """The mean cross-entropy of the input's tokens after its first, in nats (LMDeploy's `ppl`)."""
    check_fields(service, body)
    if not body.input:
        raise ApiError(400, "Input must not be empty.", param="input")
    generation = service.admit(1)
    await generation.start(partial(_submit, generation, service.frontend, body.input))
    (answer,) = await generation.complete()
    return {"ppl": mean_loss(generation.jobs[0].prompt.ids, answer)}


def _submit(generation: Generation, frontend: Frontend, given: str | list[int]) -> None:
    """On a worker thread."""
    prompt = frontend.encode_raw(given)
    if len(prompt) < 2:
        raise ApiError(400, f"input has {len(prompt)} tokens; at least 2 are needed.", param="input")
    generation.submit([Job(prompt, PERPLEXITY)], stream=False)
