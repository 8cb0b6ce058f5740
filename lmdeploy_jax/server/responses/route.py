"""POST /v1/responses."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from lmdeploy_jax.server.chat.answers import Answers
from lmdeploy_jax.server.chat.call import ChatCall
from lmdeploy_jax.server.chat.deltas import Answer, Finish
from lmdeploy_jax.server.errors import as_api_error
from lmdeploy_jax.server.http.sse import EventStream, cancel_on_disconnect
from lmdeploy_jax.server.ids import new_id
from lmdeploy_jax.server.responses.answer import (
    ResponseShape,
    ResponseWriter,
    output_items,
)
from lmdeploy_jax.server.responses.bodies import ResponsesRequest
from lmdeploy_jax.server.responses.prompt import answer_messages, chat_call, conversation, sampling
from lmdeploy_jax.server.responses.store import Message, ResponseStore
from lmdeploy_jax.server.routing import CurrentService, JsonRoute, check_fields, now
from lmdeploy_jax.server.service import Service

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
    request: Request,
    service: CurrentService,
    store: Annotated[ResponseStore, Depends(store_of)],
) -> Response | dict[str, Any]:
    """Answer a conversation, whole or as a stream of events."""
    check_fields(service, body, REFUSED)
    shape = ResponseShape(new_id("resp").replace("-", "_"), now(), service.check_model(body.model), body)
    said = conversation(body, store)
    call = chat_call(body, said, service.defaults.config(sampling(body)))
    if body.stream:
        answers = await cancel_on_disconnect(request, _begun(service, call))
        return EventStream(_events(answers, ResponseWriter(shape), said, store), answers.close)
    answers, answer = await cancel_on_disconnect(request, _whole(service, call))
    items = output_items(answer)
    if body.store and answer.finish.error is None:
        store.put(shape.id, [*said, *answer_messages(items)])
    return shape.ended(answer.finish, items, answers.usage)


async def _begun(service: Service, call: ChatCall) -> Answers:
    return await (await service.answer(call, stream=True)).begin()


async def _whole(service: Service, call: ChatCall) -> tuple[Answers, Answer]:
    answers = await service.answer(call, stream=False)
    return answers, (await answers.complete())[0]


async def _events(
    answers: Answers, writer: ResponseWriter, said: list[Message], store: ResponseStore
) -> AsyncGenerator[bytes, None]:
    finish = Finish("stop")
    yield writer.begin()
    try:
        async for deltas in answers:
            for delta in deltas:
                yield writer.write(delta)
                finish = delta.finish or finish
        if writer.shape.body.store and finish.error is None:
            store.put(writer.shape.id, [*said, *answer_messages(writer.items)])
        yield writer.end(finish, answers.usage)
    except Exception as error:
        yield writer.error(as_api_error(error))
