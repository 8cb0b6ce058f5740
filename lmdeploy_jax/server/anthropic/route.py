"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's protocol."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from lmdeploy_jax.messages import GenerationConfig
from lmdeploy_jax.server.anthropic.answer import EventWriter, error_body, message
from lmdeploy_jax.server.anthropic.bodies import CountTokensRequest, MessagesRequest
from lmdeploy_jax.server.anthropic.prompt import chat_call, sampling
from lmdeploy_jax.server.chat.answers import Answers
from lmdeploy_jax.server.chat.call import ChatCall
from lmdeploy_jax.server.chat.deltas import Answer
from lmdeploy_jax.server.errors import as_api_error, register_renderer
from lmdeploy_jax.server.http.sse import EventStream, cancel_on_disconnect
from lmdeploy_jax.server.ids import ToolCallIds, new_id
from lmdeploy_jax.server.routing import CurrentService, JsonRoute, check_fields
from lmdeploy_jax.server.service import Service

router = APIRouter(tags=["anthropic"], route_class=JsonRoute)
CALL_IDS = ToolCallIds("toolu_")
REFUSED = {
    "mcp_servers": "call the tools in your own client.",
    "container": "this server runs no containers.",
    "input_ids": "use /generate for prompts in tokens.",
    "image_data": "images are not supported.",
}
register_renderer("/v1/messages", error_body)


@router.post("/v1/messages", response_model=None)
async def messages(
    body: MessagesRequest, request: Request, service: CurrentService
) -> Response | dict[str, Any]:
    """Answer a conversation, whole or as a stream of events."""
    check_fields(service, body, REFUSED)
    model = service.check_model(body.model)
    call = chat_call(body, service.defaults.config(sampling(body)))
    id = new_id("msg").replace("-", "_")
    if body.stream:
        answers = await cancel_on_disconnect(request, _begun(service, call))
        return EventStream(_events(answers, EventWriter(id, model, CALL_IDS)), answers.close)
    answers, answer = await cancel_on_disconnect(request, _whole(service, call))
    return message(id, model, answer, answers.usage, CALL_IDS)


@router.post("/v1/messages/count_tokens")
async def count_tokens(body: CountTokensRequest, service: CurrentService) -> dict[str, int]:
    """The tokens of a request's prompt, tools included."""
    check_fields(service, body, REFUSED)
    service.check_model(body.model)
    call = chat_call(body, GenerationConfig())
    return {"input_tokens": await asyncio.to_thread(service.chat.count, call)}


async def _begun(service: Service, call: ChatCall) -> Answers:
    return await (await service.answer(call, stream=True)).begin()


async def _whole(service: Service, call: ChatCall) -> tuple[Answers, Answer]:
    answers = await service.answer(call, stream=False)
    return answers, (await answers.complete())[0]


async def _events(answers: Answers, writer: EventWriter) -> AsyncGenerator[bytes, None]:
    try:
        async for deltas in answers:
            for delta in deltas:
                yield writer.write(delta, answers.usage)
    except Exception as error:
        yield writer.error(as_api_error(error))
