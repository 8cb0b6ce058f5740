"""Requests of the Responses protocol as chat calls, and the conversations that they go on with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lmdeploy_jax.errors import RequestError
from lmdeploy_jax.messages import GenerationConfig
from lmdeploy_jax.server.chat.call import ChatCall, ToolChoice
from lmdeploy_jax.server.responses.bodies import NamedTool, ResponsesRequest, SchemaFormat, ToolChoiceAllowed
from lmdeploy_jax.server.responses.store import Message, ResponseStore
from lmdeploy_jax.text.conversation import ImagePart, normalise_messages, without_nulls
from lmdeploy_jax.text.prompts import Prompt

_TEXTS = ("input_text", "output_text", "text", "reasoning_text", "refusal")
# Fields that a GenerationConfig has under the same name.
_SAME = (
    *("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "ignore_eos", "skip_special_tokens"),
    "include_stop_str_in_output",
)


@dataclass(frozen=True)
class Conversation:
    """messages: all up to a request, without its instructions. store: where it is kept, if it is to be."""

    messages: list[Message]
    store: ResponseStore | None

    def keep(self, id: str, items: Sequence[Mapping[str, Any]]) -> None:
        """Let later requests go on from the answer of this id. A call in it that was cut off is left out."""
        if self.store is not None:
            whole = [i for i in items if i["type"] != "function_call" or i["status"] == "completed"]
            self.store.put(id, [*self.messages, *_messages(whole)])


def continued(body: ResponsesRequest, store: ResponseStore) -> Conversation:
    """What the request says after what came before it. Raises `ApiError` for a response that is not kept."""
    before = store.get(body.previous_response_id) if body.previous_response_id else []
    said = [{"role": "user", "content": body.input}] if isinstance(body.input, str) else _messages(body.input)
    return Conversation([*before, *said], store if body.store else None)


def chat_call(
    body: ResponsesRequest, said: Sequence[Message], config: GenerationConfig, *, images: bool
) -> ChatCall:
    """The call that continues `said`. System texts of the request come first, as one message.

    images: whether the model takes any.
    """
    texts = [body.instructions] if body.instructions else []
    texts += [m["content"] for m in said if m["role"] == "system"]
    system: list[Message] = [{"role": "system", "content": "\n\n".join(texts)}] if texts else []
    messages = system + [m for m in said if m["role"] != "system"]
    return ChatCall(
        Prompt(messages=tuple(normalise_messages(messages, images=images))),
        config,
        tools=[_tool(tool.model_dump(exclude_none=True)) for tool in body.tools or ()],
        tool_choice=_tool_choice(body),
        parallel_tool_calls=body.parallel_tool_calls,
        template_kwargs=_template_kwargs(body),
        cache_salt=body.cache_salt or "",
    )


def sampling(body: ResponsesRequest) -> dict[str, Any]:
    """Fields of a GenerationConfig, None for what is left open."""
    return {name: getattr(body, name) for name in _SAME} | {
        "max_new_tokens": body.max_output_tokens,
        "random_seed": None if body.seed is None else body.seed & 0xFFFFFFFF,
        "stop_words": [body.stop] if isinstance(body.stop, str) else body.stop,
        "response_format": _response_format(body),
    }


def _template_kwargs(body: ResponsesRequest) -> dict[str, Any]:
    effort = body.reasoning.effort if body.reasoning else None
    return {"reasoning_effort": effort} if effort else {}


def _response_format(body: ResponsesRequest) -> dict[str, Any] | None:
    form = body.text.format if body.text else None
    if form is None or form.type == "text":
        return None
    if isinstance(form, SchemaFormat):
        schema = form.model_dump(by_alias=True, exclude_none=True, exclude={"type"})
        return {"type": "json_schema", "json_schema": schema}
    return {"type": "json_object"}


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {k: v for k, v in tool.items() if k != "type"}}


def _tool_choice(body: ResponsesRequest) -> ToolChoice:
    match body.tool_choice:
        case NamedTool(name=name):
            return ToolChoice("required", name)
        case ToolChoiceAllowed(mode=mode, tools=tools):
            return ToolChoice(mode, allowed=tuple(tool.name for tool in tools))
        case str(mode):
            return ToolChoice(mode)


def _messages(items: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Items as messages: an assistant's reasoning, text and calls in a row are one."""
    messages: list[Message] = []
    for i, item in enumerate(items):
        message = _item(without_nulls(item), f"input[{i}]")
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


def _item(item: Mapping[str, Any], where: str) -> Message:
    match item.get("type", "message"):
        case "message":
            return _message(item, f"{where}.content")
        case "function_call":
            call = _call(_field(item, "call_id"), _field(item, "name"), _field(item, "arguments"))
            return {"role": "assistant", "content": "", "tool_calls": [call]}
        case "function_call_output":
            output = _content(item.get("output", ""), f"{where}.output")
            return {"role": "tool", "tool_call_id": _field(item, "call_id"), "content": output}
        case "reasoning":
            text = _text(item.get("content") or [])
            return {"role": "assistant", "content": "", "reasoning_content": text}
        case other:
            raise RequestError(
                f"An input item of type {other!r} is not supported: give message, function_call, "
                "function_call_output or reasoning."
            )


def _message(item: Mapping[str, Any], where: str) -> Message:
    role = item.get("role")
    if role == "user":
        return {"role": role, "content": _content(item.get("content"), where)}
    return {"role": "system" if role == "developer" else role, "content": _text(item.get("content"))}


def _call(id: str, name: str, arguments: str) -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def _content(content: Any, where: str) -> str | list[str | ImagePart]:
    """What may have images in it."""
    if not isinstance(content, list) or not any(map(_is_image, content)):
        return _text(content)
    parts = enumerate(content)
    return [_image(part, f"{where}[{i}]") if _is_image(part) else _text([part]) for i, part in parts]


def _is_image(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "input_image"


def _image(part: Mapping[str, Any], where: str) -> ImagePart:
    options = {name: value for name, value in part.items() if name not in ("type", "image_url")}
    if not isinstance(part.get("image_url"), str):
        raise RequestError(
            f"{where}: input_image needs image_url, an http(s) or data URL; no files are kept.", param=where
        )
    return ImagePart(part["image_url"], without_nulls(options), where)


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RequestError(f"The content of an item must be a text or a list of parts, not {content!r}.")
    for part in content:
        if not isinstance(part, Mapping) or part.get("type") not in _TEXTS:
            kind = part.get("type") if isinstance(part, Mapping) else part
            raise RequestError(f"A content part of type {kind!r} is not supported here: send texts.")
    return "".join(str(part.get("text", part.get("refusal", ""))) for part in content)


def _field(item: Mapping[str, Any], name: str) -> str:
    if not isinstance(item.get(name), str):
        raise RequestError(f"An input item of type {item.get('type')!r} needs {name!r}, a text.")
    return str(item[name])
