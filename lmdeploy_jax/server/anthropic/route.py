"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's protocol."""

from __future__ import annotations

from functools import partial
from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from lmdeploy_jax.messages import GenerationConfig
from lmdeploy_jax.server.anthropic.answer import NO_THREADS, EventWriter, Tokens, error_body, message
from lmdeploy_jax.server.anthropic.bodies import CountTokensRequest, MessagesRequest
from lmdeploy_jax.server.anthropic.prompt import chat_call, sampling
from lmdeploy_jax.server.errors import ApiError, Dialect, register_dialect
from lmdeploy_jax.server.generation import in_thread
from lmdeploy_jax.server.http.sse import EventStream
from lmdeploy_jax.server.ids import ToolCallIds, new_id
from lmdeploy_jax.server.routing import CurrentService, JsonRoute, check_fields

router = APIRouter(tags=["anthropic"], route_class=JsonRoute)
CALL_IDS = ToolCallIds("toolu_")
REFUSED = {
    "mcp_servers": "call the tools in your own client.",
    "container": "this server runs no containers.",
    "image_data": "use a content block of type image.",
    "return_routed_experts": "POST /generate reports them.",
    "compaction": "shorten the conversation in your own client.",
    "fallbacks": "this server has one model.",
    "fallback_credit_token": "this server has one model.",
    "thread": "send the whole conversation.",
}
register_dialect(
    "/v1/messages",
    Dialect(
        render=error_body,
        names={"stop_words": "stop_sequences", "max_new_tokens": "max_tokens"},
        too_long=lambda error: f"prompt is too long: {error.length} > {error.limit} maximum",
    ),
)


@router.post("/v1/messages", response_model=None)
async def messages(body: MessagesRequest, service: CurrentService) -> Response | dict[str, Any]:
    """Answer a conversation, whole or as a stream of events."""
    _check_thread(body)
    check_fields(service, body, REFUSED)
    model = service.check_model(body.model)
    config = service.defaults.config(sampling(body))
    call = chat_call(body, config, images=service.frontend.takes_images)
    id = new_id("msg").replace("-", "_")
    answers = await service.answer(call, stream=body.stream, name=id)
    tokens = Tokens.asked(body)
    if body.stream:
        return EventStream(EventWriter(id, model, CALL_IDS, tokens).events(answers), answers.close)
    (answer,) = await answers.complete()
    return message(id, model, answer, answers.usage, CALL_IDS, tokens)


def _check_thread(body: MessagesRequest) -> None:
    """Tool runners of Anthropic's clients ask for a thread by themselves, and send the whole conversation
    once they are told that there is none.
    """
    if (body.model_extra or {}).get("thread"):
        message = f"thread is not supported: {REFUSED['thread']}"
        raise ApiError(400, message, param="thread", code=NO_THREADS)


@router.post("/v1/messages/count_tokens")
async def count_tokens(body: CountTokensRequest, service: CurrentService) -> dict[str, int]:
    """The tokens of a request's prompt, tools and images included."""
    check_fields(service, body, REFUSED)
    service.check_model(body.model)
    call = chat_call(body, GenerationConfig(), images=service.frontend.takes_images)
    count = partial(service.chat.count, call)
    return {"input_tokens": await in_thread(count, images=call.prompt.has_images)}
