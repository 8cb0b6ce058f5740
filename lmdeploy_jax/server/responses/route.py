"""POST /v1/responses."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from lmdeploy_jax.server.http.sse import EventStream
from lmdeploy_jax.server.ids import new_id, now
from lmdeploy_jax.server.responses.answer import (
    ResponseShape,
    ResponseWriter,
    output_items,
)
from lmdeploy_jax.server.responses.bodies import ResponsesRequest
from lmdeploy_jax.server.responses.prompt import chat_call, continued, sampling
from lmdeploy_jax.server.responses.store import ResponseStore
from lmdeploy_jax.server.routing import CurrentService, JsonRoute, check_fields

router = APIRouter(tags=["responses"], route_class=JsonRoute)
REFUSED = {
    "background": "leave it out and stream instead.",
    "conversation": "use previous_response_id.",
    "context_management": "shorten the conversation in your own client.",
    "prompt": "send the text itself.",
    "max_tool_calls": "use parallel_tool_calls: false.",
    "top_logprobs": "use /v1/chat/completions.",
}


def store_of(request: Request) -> ResponseStore:
    store: ResponseStore = request.app.state.responses
    return store


@router.post("/v1/responses", response_model=None)
async def responses(
    body: ResponsesRequest,
    service: CurrentService,
    store: Annotated[ResponseStore, Depends(store_of)],
) -> Response | dict[str, Any]:
    """Answer a conversation, whole or as a stream of events."""
    check_fields(service, body, REFUSED)
    shape = ResponseShape(new_id("resp").replace("-", "_"), now(), service.check_model(body.model), body)
    conversation = continued(body, store)
    config = service.defaults.config(sampling(body))
    call = chat_call(body, conversation.messages, config, images=service.frontend.takes_images)
    answers = await service.answer(call, stream=body.stream)
    if body.stream:
        return EventStream(ResponseWriter(shape, conversation).events(answers), answers.close)
    (answer,) = await answers.complete()
    items = output_items(answer)
    if answer.finish.error is None:
        conversation.keep(shape.id, items)
    return shape.ended(answer.finish, items, answers.usage)
