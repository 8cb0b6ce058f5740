"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

import orjson
from fastapi import APIRouter, Request
from starlette.responses import Response

from lmdeploy_jax.messages import GenerationConfig
from lmdeploy_jax.server.answers import Answer, Answers
from lmdeploy_jax.server.call_ids import CallIds
from lmdeploy_jax.server.chat import ChatCall, ToolChoice
from lmdeploy_jax.server.chat_chunks import ChatShape, ChunkWriter, completion
from lmdeploy_jax.server.errors import ApiError
from lmdeploy_jax.server.protocol.chat import AllowedChoice, ChatCompletionRequest, Choice, NamedChoice
from lmdeploy_jax.server.routes.common import CurrentService, JsonRoute, check_fields, new_id, now
from lmdeploy_jax.server.service import Service
from lmdeploy_jax.server.sse import EventStream, openai_events, unless_gone
from lmdeploy_jax.text.conversation import normalise_messages
from lmdeploy_jax.text.prompts import Prompt

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
    call = chat_call(body, service)
    shape = _shape(body, service, model)
    if body.stream:
        answers = await unless_gone(request, _begun(service, call, shape.id, body.session_id))
        return EventStream(openai_events(_chunks(answers, shape, service.call_ids)), answers.close)
    answers, whole = await unless_gone(request, _whole(service, call, shape.id, body.session_id))
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


async def _chunks(answers: Answers, shape: ChatShape, call_ids: CallIds) -> AsyncGenerator[bytes, None]:
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


def chat_call(body: ChatCompletionRequest, service: Service) -> ChatCall:
    """The request as every protocol says it. Raises `ApiError`, `RequestError` and `ConfigError`."""
    prompt, chat = _prompt(body)
    return ChatCall(
        prompt,
        _config(body, service),
        chat=chat and body.do_preprocess,
        tools=[tool.model_dump(exclude_none=True) for tool in body.tools or ()],
        tool_choice=_tool_choice(body.tool_choice),
        parallel_tool_calls=body.parallel_tool_calls,
        template_kwargs=_template_kwargs(body),
    )


def _prompt(body: ChatCompletionRequest) -> tuple[Prompt, bool]:
    """The prompt, and whether it is a conversation."""
    if bool(body.messages) == (body.input_ids is not None):
        raise ApiError(400, "Give exactly one of messages and input_ids.", param="messages")
    if body.input_ids is not None:
        return Prompt(token_ids=tuple(body.input_ids)), True
    if isinstance(body.messages, str):
        return Prompt(text=body.messages), False
    return Prompt(messages=tuple(normalise_messages(body.messages))), True


def _config(body: ChatCompletionRequest, service: Service) -> GenerationConfig:
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true.", param="top_logprobs")
    given = body.sampling() | {
        "n": body.n,
        "response_format": body.response_format and body.response_format.as_dict(),
    }
    if body.max_completion_tokens is not None:
        given["max_new_tokens"] = body.max_completion_tokens
    if body.logprobs or body.return_logprob:
        given["logprobs"] = body.top_logprobs or 0
    return service.defaults.config(given)


def _tool_choice(choice: Choice | None) -> ToolChoice:
    match choice:
        case NamedChoice():
            return ToolChoice("required", choice.function.name)
        case AllowedChoice():
            names = tuple(tool.function.name for tool in choice.allowed_tools.tools)
            return ToolChoice(choice.allowed_tools.mode, allowed=names)
        case str():
            return ToolChoice(choice)
    return ToolChoice()


def _template_kwargs(body: ChatCompletionRequest) -> dict[str, Any]:
    named = {"enable_thinking": body.enable_thinking, "reasoning_effort": body.reasoning_effort}
    return {name: value for name, value in named.items() if value is not None} | (
        body.chat_template_kwargs or {}
    )
