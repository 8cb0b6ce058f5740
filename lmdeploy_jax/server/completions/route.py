"""POST /v1/completions."""

from __future__ import annotations

import orjson
from fastapi import APIRouter
from starlette.responses import Response

from lmdeploy_jax.server.completions.answer import CompletionWriter, completion_shape
from lmdeploy_jax.server.completions.bodies import CompletionRequest
from lmdeploy_jax.server.completions.prompt import check, generation_config, prompts_of
from lmdeploy_jax.server.errors import Dialect, register_dialect
from lmdeploy_jax.server.http.sse import EventStream, openai_events
from lmdeploy_jax.server.ids import new_id
from lmdeploy_jax.server.routing import CurrentService, JsonRoute, check_fields

router = APIRouter(tags=["completions"], route_class=JsonRoute)
register_dialect("/v1/completions", Dialect(prompt="prompt"))


@router.post("/v1/completions", response_model=None)
async def completions(body: CompletionRequest, service: CurrentService) -> Response:
    """Continue texts as they are, without the chat template."""
    check_fields(service, body)
    check(body)
    model = service.check_model(body.model)
    prompts, config = prompts_of(body), generation_config(body, service.defaults)
    id = new_id("cmpl")
    generation = await service.generate(
        prompts,
        config,
        stream=body.stream,
        name=id,
        session_id=body.session_id,
        cache_salt=body.cache_salt or "",
    )
    writer = CompletionWriter(
        completion_shape(body, id, model, service.frontend.tokenizer, prompts, generation.jobs)
    )
    if body.stream:
        return EventStream(openai_events(writer.chunks(generation)), generation.close)
    return Response(orjson.dumps(await writer.whole(generation)), media_type="application/json")
