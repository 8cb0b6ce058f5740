"""Anthropic's requests as chat calls."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lmdeploy_jax.errors import RequestError
from lmdeploy_jax.messages import GenerationConfig
from lmdeploy_jax.server.anthropic.blocks import read, seen
from lmdeploy_jax.server.anthropic.bodies import (
    Content,
    CountTokensRequest,
    InputMessage,
    InputToolChoice,
    MessagesRequest,
)
from lmdeploy_jax.server.anthropic.tools import client_tools, tool_choice
from lmdeploy_jax.server.bodies import width
from lmdeploy_jax.server.chat.call import ChatCall
from lmdeploy_jax.text.conversation import ImagePart, normalise_messages
from lmdeploy_jax.text.prompts import Prompt

Message = dict[str, Any]
RAW_ARGUMENTS = "raw_arguments"  # the one key of a call's input that was no JSON: its text
_BILLING = "x-anthropic-billing-header"  # a block that some clients put first; it is not for the model


def chat_call(body: CountTokensRequest, config: GenerationConfig, *, images: bool) -> ChatCall:
    """The request's prompt and tools. images: whether the model takes any.

    Raises `RequestError` for content that a model cannot read, and for tools that cannot be called.
    """
    choice = body.tool_choice or InputToolChoice(type="auto")
    tools = body.tools or ()
    return ChatCall(
        _prompt(body, images),
        config,
        tools=client_tools(tools),
        tool_choice=tool_choice(choice, tools),
        parallel_tool_calls=not choice.disable_parallel_tool_use,
        template_kwargs=_template_kwargs(body),
    )


def sampling(body: MessagesRequest) -> dict[str, Any]:
    """Fields of a GenerationConfig, None for what is left open."""
    return {
        "max_new_tokens": body.max_tokens,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": width(body.top_k),
        "stop_words": body.stop_sequences,
        "include_stop_str_in_output": body.include_stop_str_in_output,
        "response_format": body.form(),
        "logprobs": 0 if body.return_logprob else None,
    }


def _prompt(body: CountTokensRequest, images: bool) -> Prompt:
    ids = body.input_ids if isinstance(body, MessagesRequest) else None
    if ids is not None and body.messages:
        raise RequestError("Give exactly one of messages and input_ids.", param="messages")
    if ids is not None:
        return Prompt(token_ids=tuple(ids))
    if not body.messages:
        raise RequestError("messages: a conversation needs at least one message.", param="messages")
    return Prompt(messages=tuple(normalise_messages(_messages(body), images=images)))


def _template_kwargs(body: CountTokensRequest) -> dict[str, Any]:
    """An effort says how much to think, not whether: without `thinking` no client expects thoughts."""
    if body.thinking is None:
        return {}
    thinks = body.thinking.type != "disabled"
    effort = body.output_config.effort if body.output_config and thinks else None
    return {"enable_thinking": thinks} | ({"reasoning_effort": effort} if effort else {})


def _messages(body: CountTokensRequest) -> list[Message]:
    """All system texts first, as one message, then the turns."""
    turns = [(f"messages[{i}].content", message) for i, message in enumerate(body.messages)]
    system = [_system_text(body.system or "", "system")]
    system += [_system_text(message.content, where) for where, message in turns if message.role == "system"]
    text = "\n\n".join(part for part in system if part)
    first = [{"role": "system", "content": text}] if text else []
    rest = (_turn(message, where) for where, message in turns if message.role != "system")
    return first + [said for turn in rest for said in turn]


def _system_text(content: Content, where: str) -> str:
    if isinstance(content, str):
        return content
    texts = [read(block, f"{where}[{i}]") for i, block in enumerate(content)]
    return "\n\n".join(text for text in texts if not text.startswith(_BILLING))


def _turn(message: InputMessage, where: str) -> list[Message]:
    if isinstance(message.content, str):
        return [{"role": message.role, "content": message.content}]
    turn = _assistant if message.role == "assistant" else _user
    return turn(message.content, where)


def _user(blocks: list[dict[str, Any]], where: str) -> list[Message]:
    """Results of tools come first, each a message of its own, then what the user says."""
    results: list[Message] = []
    said: list[str | ImagePart] = []
    for i, block in enumerate(blocks):
        if block.get("type") == "tool_result":
            results.append(_tool_result(block, f"{where}[{i}].content"))
        else:
            said.append(seen(block, f"{where}[{i}]"))
    return results + ([{"role": "user", "content": said}] if said or not results else [])


def _assistant(blocks: list[dict[str, Any]], where: str) -> list[Message]:
    message: Message = {"role": "assistant", "content": ""}
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[dict[str, Any]] = []
    for i, block in enumerate(blocks):
        match block.get("type"):
            case "tool_use":
                calls.append(_tool_use(block))
            case "thinking":
                thoughts.append(_field(block, "thinking"))
            case "redacted_thinking":
                pass  # encrypted for another model
            case _:
                texts.append(read(block, f"{where}[{i}]"))
    message["content"] = "".join(texts)
    if thoughts:
        message["reasoning_content"] = "".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    return [message]


def _tool_use(block: Mapping[str, Any]) -> dict[str, Any]:
    given = block.get("input") or {}
    raw = given.get(RAW_ARGUMENTS) if isinstance(given, Mapping) and len(given) == 1 else None
    function = {"name": _field(block, "name"), "arguments": raw if isinstance(raw, str) else given}
    return {"id": _field(block, "id"), "type": "function", "function": function}


def _tool_result(block: Mapping[str, Any], where: str) -> Message:
    content = block.get("content") or ""
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    told = [seen(part, f"{where}[{i}]") for i, part in enumerate(parts)]
    if block.get("is_error"):
        first = told[:1] if isinstance(told[0], str) else [""]
        told = [f"Error: {first[0]}", *told[len(first) :]]
    return {"role": "tool", "tool_call_id": _field(block, "tool_use_id"), "content": told}


def _field(block: Mapping[str, Any], name: str) -> str:
    if not isinstance(block.get(name), str):
        raise RequestError(f"A {block.get('type')} block needs {name!r}, a text.")
    return str(block[name])
