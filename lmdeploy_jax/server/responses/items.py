"""Input items as messages."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lmdeploy_jax.errors import RequestError
from lmdeploy_jax.server.chat.custom_tools import INPUT
from lmdeploy_jax.server.responses.tools import Toolbox
from lmdeploy_jax.text.conversation import ImagePart, without_nulls

Item = Mapping[str, Any]
Message = dict[str, Any]
ROLES = ("user", "assistant", "system", "developer")
_TEXTS = ("input_text", "output_text", "text", "reasoning_text", "summary_text", "refusal")
# What tools that others ran have done earlier, and which parts of it can be read.
_EARLIER = {
    "web_search_call": ("action",),
    "file_search_call": ("queries", "results"),
    "code_interpreter_call": ("code", "outputs"),
    "mcp_call": ("name", "arguments", "output", "error"),
    "local_shell_call": ("action",),
    "local_shell_call_output": ("output",),
    "shell_call": ("action",),
    "shell_call_output": ("output",),
    "apply_patch_call": ("operation",),
    "apply_patch_call_output": ("output",),
}


def messages_of(items: Sequence[Item], toolbox: Toolbox, find: Callable[[str], Item]) -> list[Message]:
    """Items as messages: an assistant's reasoning, text and calls in a row are one.

    find: the item of an earlier answer that a reference names. Raises `RequestError`.
    """
    messages: list[Message] = []
    for i, item in enumerate(items):
        if item.get("type") == "item_reference":
            item = find(_field(item, "id"))
        message = _item(without_nulls(item), toolbox, f"input[{i}]")
        last = messages[-1] if messages else None
        if last and last["role"] == message["role"] == "assistant":
            _join(last, message)
        else:
            messages.append(message)
    return messages


def _join(last: Message, message: Message) -> None:
    last["content"] += message["content"]
    for name in ("reasoning_content", "tool_calls"):
        if name in message:
            last[name] = last[name] + message[name] if name in last else message[name]


def _item(item: Item, toolbox: Toolbox, where: str) -> Message:
    match item.get("type", "message"):
        case "message":
            return _message(item, where)
        case "function_call":
            return _called(item, toolbox, _field(item, "arguments"))
        case "custom_tool_call":
            return _called(item, toolbox, {INPUT: _field(item, "input")})
        case "function_call_output" | "custom_tool_call_output":
            output = _content(item.get("output", ""), f"{where}.output")
            return {"role": "tool", "tool_call_id": _field(item, "call_id"), "content": output}
        case "reasoning":
            text = _text(item.get("content") or item.get("summary") or [], where)
            return {"role": "assistant", "content": "", "reasoning_content": text}
        case str(kind) if kind in _EARLIER:
            told = {name: item[name] for name in _EARLIER[kind] if name in item}
            return {"role": "assistant", "content": f"[{kind}: {json.dumps(told, ensure_ascii=False)}]\n"}
        case other:
            raise RequestError(
                f"{where}: an input item of type {other!r} is not supported: give message, function_call, "
                "function_call_output, custom_tool_call, custom_tool_call_output, reasoning, item_reference.",
                param=where,
            )


def _called(item: Item, toolbox: Toolbox, arguments: str | dict[str, str]) -> Message:
    name = toolbox.name_of(_field(item, "name"), item.get("namespace"))
    call = {"name": name, "arguments": arguments}
    calls = [{"id": _field(item, "call_id"), "type": "function", "function": call}]
    return {"role": "assistant", "content": "", "tool_calls": calls}


def _message(item: Item, where: str) -> Message:
    role = item.get("role")
    if role not in ROLES:
        known = ", ".join(ROLES)
        raise RequestError(f"{where}.role: unknown role {role!r}. Use one of {known}.", param=f"{where}.role")
    where = f"{where}.content"
    if role == "user":
        return {"role": role, "content": _content(item.get("content"), where)}
    return {"role": "system" if role == "developer" else role, "content": _text(item.get("content"), where)}


def _content(content: Any, where: str) -> str | list[str | ImagePart]:
    """What may have images in it."""
    if not isinstance(content, list) or not any(map(_is_image, content)):
        return _text(content, where)
    parts = enumerate(content)
    return [_image(part, f"{where}[{i}]") if _is_image(part) else _text([part], where) for i, part in parts]


def _is_image(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "input_image"


def _image(part: Item, where: str) -> ImagePart:
    options = {name: value for name, value in part.items() if name not in ("type", "image_url")}
    if not isinstance(part.get("image_url"), str):
        raise RequestError(
            f"{where}: input_image needs image_url, an http(s) or data URL; no files are kept.", param=where
        )
    return ImagePart(part["image_url"], without_nulls(options), where)


def _text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RequestError(f"{where} must be a text or a list of parts, not {content!r}.", param=where)
    return "".join(_text_of(part, f"{where}[{i}]") for i, part in enumerate(content))


def _text_of(part: Any, where: str) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else part
    if not isinstance(part, Mapping) or kind not in _TEXTS:
        raise RequestError(
            f"{where}: a content part of type {kind!r} is not supported: send texts.", param=where
        )
    text = part.get("text", part.get("refusal", ""))
    if not isinstance(text, str):
        raise RequestError(
            f"{where}.text={text!r:.100} is invalid: it must be a text.", param=f"{where}.text"
        )
    return text


def _field(item: Item, name: str) -> str:
    if not isinstance(item.get(name), str):
        raise RequestError(f"An input item of type {item.get('type')!r} needs {name!r}, a text.")
    return str(item[name])
