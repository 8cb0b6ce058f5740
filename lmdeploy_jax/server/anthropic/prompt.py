"""Anthropic's requests as chat calls."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lmdeploy_jax.errors import RequestError
from lmdeploy_jax.messages import GenerationConfig
from lmdeploy_jax.server.anthropic.bodies import (
    Content,
    CountTokensRequest,
    InputMessage,
    InputTool,
    InputToolChoice,
    MessagesRequest,
)
from lmdeploy_jax.server.chat.call import ChatCall, ToolChoice
from lmdeploy_jax.text.conversation import ImagePart, normalise_messages
from lmdeploy_jax.text.prompts import Prompt
from lmdeploy_jax.text.template_arguments import Tool

Message = dict[str, Any]
RAW_ARGUMENTS = "raw_arguments"  # the one key of a call's input that was no JSON: its text
_BILLING = "x-anthropic-billing-header"  # a block that some clients put first; it is not for the model
_MODES: dict[str, Any] = {"auto": "auto", "none": "none", "any": "required", "tool": "required"}


def chat_call(body: CountTokensRequest, config: GenerationConfig, *, images: bool) -> ChatCall:
    """The request's prompt and tools. images: whether the model takes any.

    Raises `RequestError` for content that is not text, tool use or an image of the user's or a tool's.
    """
    choice = body.tool_choice or InputToolChoice(type="auto")
    return ChatCall(
        Prompt(messages=tuple(normalise_messages(_messages(body), images=images))),
        config,
        tools=[_tool(tool) for tool in body.tools or ()],
        tool_choice=_tool_choice(choice),
        parallel_tool_calls=not choice.disable_parallel_tool_use,
        template_kwargs=_template_kwargs(body),
    )


def sampling(body: MessagesRequest) -> dict[str, Any]:
    """Fields of a GenerationConfig, None for what is left open."""
    return {
        "max_new_tokens": body.max_tokens,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": body.top_k,
        "stop_words": body.stop_sequences,
        "include_stop_str_in_output": body.include_stop_str_in_output,
    }


def _template_kwargs(body: CountTokensRequest) -> dict[str, Any]:
    return {} if body.thinking is None else {"enable_thinking": body.thinking.type != "disabled"}


def _tool_choice(choice: InputToolChoice) -> ToolChoice:
    if choice.type == "tool" and not choice.name:
        raise RequestError("tool_choice.name: type 'tool' needs the name of the tool that must be used.")
    return ToolChoice(_MODES[choice.type], choice.name if choice.type == "tool" else None)


def _tool(tool: InputTool) -> Tool:
    function = {"name": tool.name, "description": tool.description or "", "parameters": tool.input_schema}
    return {"type": "function", "function": function}


def _messages(body: CountTokensRequest) -> list[Message]:
    """All system texts first, as one message, then the turns."""
    turns = [(i, message) for i, message in enumerate(body.messages) if message.role != "system"]
    system = [_system_text(body.system or "")]
    system += [_system_text(message.content) for message in body.messages if message.role == "system"]
    text = "\n\n".join(part for part in system if part)
    first = [{"role": "system", "content": text}] if text else []
    return first + [said for i, message in turns for said in _turn(message, f"messages[{i}].content")]


def _system_text(content: Content) -> str:
    if isinstance(content, str):
        return content
    texts = [_text(block, "system") for block in content]
    return "\n\n".join(text for text in texts if not text.startswith(_BILLING))


def _turn(message: InputMessage, where: str) -> list[Message]:
    if isinstance(message.content, str):
        return [{"role": message.role, "content": message.content}]
    return _assistant(message.content) if message.role == "assistant" else _user(message.content, where)


def _user(blocks: list[dict[str, Any]], where: str) -> list[Message]:
    """Results of tools come first, each a message of its own, then what the user says."""
    results: list[Message] = []
    said: list[str | ImagePart] = []
    for i, block in enumerate(blocks):
        if block.get("type") == "tool_result":
            results.append(_tool_result(block, f"{where}[{i}].content"))
        else:
            said.append(_seen(block, "user", f"{where}[{i}]"))
    return results + ([{"role": "user", "content": said}] if said or not results else [])


def _assistant(blocks: list[dict[str, Any]]) -> list[Message]:
    message: Message = {"role": "assistant", "content": ""}
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[dict[str, Any]] = []
    for block in blocks:
        match block.get("type"):
            case "tool_use":
                calls.append(_tool_use(block))
            case "thinking":
                thoughts.append(_field(block, "thinking"))
            case "redacted_thinking":
                pass  # encrypted for another model
            case _:
                texts.append(_text(block, "assistant"))
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
    told = [_seen(part, "tool_result", f"{where}[{i}]") for i, part in enumerate(parts)]
    if block.get("is_error"):
        first = told[:1] if isinstance(told[0], str) else [""]
        told = [f"Error: {first[0]}", *told[len(first) :]]
    return {"role": "tool", "tool_call_id": _field(block, "tool_use_id"), "content": told}


def _seen(block: Any, whose: str, where: str) -> str | ImagePart:
    """A text or an image. whose: the message; where: the block, both as errors name them."""
    if not isinstance(block, Mapping) or block.get("type") != "image":
        return _text(block, whose)
    match block.get("source"):
        case {"type": "base64", "media_type": str(kind), "data": str(data)}:
            return ImagePart(f"data:{kind};base64,{data}", where=where)
        case {"type": "url", "url": str(url)}:
            return ImagePart(url, where=where)
    raise RequestError(
        f"{where}.source: give {{'type': 'base64', 'media_type': ..., 'data': ...}} or "
        "{'type': 'url', 'url': ...}; no files are kept here.",
        param=where,
    )


def _text(block: Any, where: str) -> str:
    if not isinstance(block, Mapping):
        raise RequestError(f"A content block in a {where} message must be an object, not {block!r}.")
    if block.get("type") != "text" or not isinstance(block.get("text"), str):
        raise RequestError(
            f"A content block of type {block.get('type')!r} in a {where} message is not supported: "
            "this server reads text, image, tool_use, tool_result and thinking."
        )
    return str(block["text"])


def _field(block: Mapping[str, Any], name: str) -> str:
    if not isinstance(block.get(name), str):
        raise RequestError(f"A {block.get('type')} block needs {name!r}, a text.")
    return str(block[name])
