"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator

import orjson
from fastapi import APIRouter, Request
from starlette.responses import Response

from lmdeploy_jax.server.chat.answers import Answers
from lmdeploy_jax.server.chat.call import ChatCall
from lmdeploy_jax.server.chat.deltas import Answer
from lmdeploy_jax.server.http.sse import EventStream, cancel_on_disconnect, openai_events
from lmdeploy_jax.server.ids import ToolCallIds, new_id
from lmdeploy_jax.server.openai_chat.answer import ChatShape, ChunkWriter, completion
from lmdeploy_jax.server.openai_chat.bodies import ChatCompletionRequest
from lmdeploy_jax.server.openai_chat.prompt import chat_call
from lmdeploy_jax.server.routing import CurrentService, JsonRoute, check_fields, now
from lmdeploy_jax.server.service import Service

router = APIRouter(tags=["chat"], route_class=JsonRoute)
REFUSED = {
    "functions": "use tools.",
    "function_call": "use tool_choice.",
    "audio": "this server answers with text.",
    "web_search_options": "this server cannot search the web.",
    "image_data": "images are not supported.",
    "migration_request": "prefill and decode run in one engine.",
    "with_cache": "prefill and decode run in one engine.",
    "preserve_cache": "prefill and decode run in one engine.",
    "return_routed_experts": "routed experts are not reported.",
}


@router.post("/v1/chat/completions", response_model=None)
async def chat_completions(
    body: ChatCompletionRequest, request: Request, service: CurrentService
) -> Response:
    """Answer a conversation, whole or as a stream of chunks."""
    check_fields(service, body, REFUSED)
    model = service.check_model(body.model)
    call = chat_call(body, service.defaults)
    shape = _shape(body, service, model)
    if body.stream:
        answers = await cancel_on_disconnect(request, _begun(service, call, shape.id, body.session_id))
        return EventStream(openai_events(_chunks(answers, shape, service.call_ids)), answers.close)
    answers, whole = await cancel_on_disconnect(request, _whole(service, call, shape.id, body.session_id))
    content = completion(shape, whole, answers.usage, service.call_ids)
    return Response(orjson.dumps(content), media_type="application/json")


async def _begun(service: Service, call: ChatCall, name: str, session_id: int | None) -> Answers:
    answers = await service.answer(call, stream=True, name=name, session_id=session_id)
    return await answers.begin()


async def _whole(
    service: Service, call: ChatCall, name: str, session_id: int | None
) -> tuple[Answers, list[Answer]]:
    answers = await service.answer(call, stream=False, name=name, session_id=session_id)
    return answers, await answers.complete()


async def _chunks(answers: Answers, shape: ChatShape, call_ids: ToolCallIds) -> AsyncGenerator[bytes, None]:
    writer = ChunkWriter(shape, call_ids)
    async for deltas in answers:
        yield writer.write(deltas)
    if shape.include_usage:
        yield writer.usage(answers.usage)


def _shape(body: ChatCompletionRequest, service: Service, model: str) -> ChatShape:
    return ChatShape(
        id=new_id("chatcmpl"),
        created=now(),
        model=model,
        tokenizer=service.frontend.tokenizer,
        top_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        return_logprob=body.return_logprob,
        return_token_ids=body.return_token_ids,
        include_usage=body.stream_options is not None and body.stream_options.include_usage,
    )
