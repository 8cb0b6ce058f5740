"""POST /v1/chat/completions."""

from __future__ import annotations

import orjson
from fastapi import APIRouter
from starlette.responses import Response

from lmdeploy_jax.server.http.sse import EventStream, openai_events
from lmdeploy_jax.server.openai_chat.answer import ChunkWriter, chat_shape, completion
from lmdeploy_jax.server.openai_chat.bodies import ChatCompletionRequest
from lmdeploy_jax.server.openai_chat.prompt import chat_call
from lmdeploy_jax.server.routing import CurrentService, JsonRoute, check_fields

router = APIRouter(tags=["chat"], route_class=JsonRoute)
REFUSED = {
    "functions": "use tools.",
    "function_call": "use tool_choice.",
    "audio": "this server answers with text.",
    "web_search_options": "this server cannot search the web.",
    "image_data": "send parts of type image_url in messages.",
    "migration_request": "prefill and decode run in one engine.",
    "with_cache": "prefill and decode run in one engine.",
    "preserve_cache": "prefill and decode run in one engine.",
    "return_routed_experts": "POST /generate reports them.",
    "moderation": "this server judges nobody; ask a model for it.",
}


@router.post("/v1/chat/completions", response_model=None)
async def chat_completions(body: ChatCompletionRequest, service: CurrentService) -> Response:
    """Answer a conversation, whole or as a stream of chunks."""
    check_fields(service, body, REFUSED)
    model = service.check_model(body.model)
    call = chat_call(body, service.defaults, images=service.frontend.takes_images)
    reasons = service.chat.reasoning is not None
    shape = chat_shape(body, model, service.frontend.tokenizer, reasons=reasons)
    answers = await service.answer(call, stream=body.stream, name=shape.id, session_id=body.session_id)
    if body.stream:
        chunks = ChunkWriter(shape, service.call_ids).chunks(answers)
        return EventStream(openai_events(chunks), answers.close)
    content = completion(shape, await answers.complete(), answers.usage, service.call_ids)
    return Response(orjson.dumps(content), media_type="application/json")
