"""OpenAI's chat requests as chat calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lmdeploy_jax.engine.io.sampling_defaults import SamplingDefaults
from lmdeploy_jax.messages import GenerationConfig
from lmdeploy_jax.server.bodies import length
from lmdeploy_jax.server.chat.call import ChatCall, ToolChoice
from lmdeploy_jax.server.chat.custom_tools import INPUT, custom_function
from lmdeploy_jax.server.errors import ApiError
from lmdeploy_jax.server.openai_chat.bodies import (
    AllowedChoice,
    ChatCompletionCustomTool,
    ChatCompletionFunctionTool,
    ChatCompletionRequest,
    Choice,
)
from lmdeploy_jax.text.conversation import normalise_messages
from lmdeploy_jax.text.prompts import MEDIA_OPTIONS, Prompt, with_media_options


def chat_call(body: ChatCompletionRequest, defaults: SamplingDefaults, *, images: bool) -> ChatCall:
    """The request as every protocol says it. images: whether the model takes any.

    Raises `ApiError`, `RequestError` and `ConfigError`.
    """
    prompt, chat = _prompt(body, images)
    return ChatCall(
        prompt,
        _config(body, defaults),
        chat=chat and body.do_preprocess,
        tools=list(map(_as_function, _tools(body))),
        tool_choice=_tool_choice(body.tool_choice),
        parallel_tool_calls=body.parallel_tool_calls,
        template_kwargs=_template_kwargs(body),
        cache_salt=body.cache_salt or "",
    )


def _prompt(body: ChatCompletionRequest, images: bool) -> tuple[Prompt, bool]:
    """The prompt, and whether it is a conversation."""
    if bool(body.messages) == (body.input_ids is not None):
        raise ApiError(400, "Give exactly one of messages and input_ids.", param="messages")
    if body.input_ids is not None:
        return Prompt(token_ids=tuple(body.input_ids)), True
    if isinstance(body.messages, str):
        return Prompt(text=body.messages), False
    prompt = Prompt(messages=tuple(normalise_messages(_with_functions(body.messages), images=images)))
    return with_media_options(prompt, {name: getattr(body, name) for name in MEDIA_OPTIONS}), True


def _config(body: ChatCompletionRequest, defaults: SamplingDefaults) -> GenerationConfig:
    if body.top_logprobs and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true.", param="top_logprobs")
    given = body.sampling() | {
        "n": body.n,
        "response_format": body.form(),
    }
    if body.max_completion_tokens is not None:
        given["max_new_tokens"] = length(body.max_completion_tokens)
    if body.logprobs or body.return_logprob:
        given["logprobs"] = body.top_logprobs or 0
    return defaults.config(given)


def _tools(body: ChatCompletionRequest) -> Sequence[ChatCompletionFunctionTool | ChatCompletionCustomTool]:
    """The request's tools. It may list them, with their schemas, as those that are allowed."""
    if body.tools or not isinstance(body.tool_choice, AllowedChoice):
        return body.tools or ()
    tools = body.tool_choice.allowed_tools.tools
    whole = (
        isinstance(tool, ChatCompletionCustomTool) or tool.function.parameters is not None for tool in tools
    )
    return tools if all(whole) else ()


def _as_function(tool: ChatCompletionFunctionTool | ChatCompletionCustomTool) -> dict[str, Any]:
    if isinstance(tool, ChatCompletionFunctionTool):
        return tool.model_dump(exclude_none=True)
    grammar = (tool.custom.format or {}).get("grammar")
    return custom_function(
        tool.custom.name, tool.custom.description, grammar if isinstance(grammar, dict) else None
    )


def custom_names(body: ChatCompletionRequest) -> frozenset[str]:
    """The tools whose calls are told as those of custom tools."""
    return frozenset(tool.custom.name for tool in _tools(body) if isinstance(tool, ChatCompletionCustomTool))


def _name(tool: ChatCompletionFunctionTool | ChatCompletionCustomTool) -> str:
    return tool.custom.name if isinstance(tool, ChatCompletionCustomTool) else tool.function.name


def _tool_choice(choice: Choice | None) -> ToolChoice:
    match choice:
        case ChatCompletionFunctionTool() | ChatCompletionCustomTool():
            return ToolChoice("required", _name(choice))
        case AllowedChoice():
            names = tuple(map(_name, choice.allowed_tools.tools))
            return ToolChoice(choice.allowed_tools.mode, allowed=names)
        case str():
            return ToolChoice(choice)
    return ToolChoice()


def _with_functions(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The conversation with all calls as those of functions, as a model sees them."""
    told, last = [], ""
    for i, message in enumerate(messages):
        match message:
            case {"role": "assistant", "function_call": {"name": str(name)} as call, **rest}:
                last = f"call{i:05}"  # nine letters and digits, which Mistral's templates insist on
                function = {"name": name, "arguments": call.get("arguments")}
                calls = [{"id": last, "type": "function", "function": function}]
                told.append(rest | {"role": "assistant", "tool_calls": calls})
            case {"role": "function", **rest}:
                told.append({"tool_call_id": last} | rest | {"role": "tool"})
            case {"tool_calls": list(calls)}:
                told.append(message | {"tool_calls": list(map(_as_call, calls))})
            case _:
                told.append(message)
    return told


def _as_call(call: Any) -> Any:
    match call:
        case {"type": "custom", "custom": {"name": str(name), "input": str(text)}}:
            function = {"name": name, "arguments": {INPUT: text}}
            return {"id": call.get("id"), "type": "function", "function": function}
    return call


def _template_kwargs(body: ChatCompletionRequest) -> dict[str, Any]:
    named = {"enable_thinking": body.enable_thinking, "reasoning_effort": body.reasoning_effort}
    return {name: value for name, value in named.items() if value is not None} | (
        body.chat_template_kwargs or {}
    )
