"""OpenAI-style messages, checked and brought to one shape that chat templates can rely on."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lmdeploy_jax.errors import RequestError

ROLES = ("system", "developer", "user", "assistant", "tool")
TEXT_PARTS = ("text", "input_text", "output_text", "refusal")
MEDIA_PARTS = {
    "image": "images", "image_url": "images", "input_image": "images", "image_data": "images",
    "video": "videos", "video_url": "videos",
    "audio": "audio", "audio_url": "audio", "input_audio": "audio",
}  # fmt: skip

IMAGE_TOKEN = "<IMAGE_TOKEN>"  # stands in a message's texts where its images are to be
ILLUSTRATED = ("user", "tool")  # roles whose messages may have images

REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")

Message = dict[str, Any]


@dataclass(frozen=True, eq=False)
class ImagePart:
    """An image among the parts of a message. source: see `vision.load_image`; options: see
    `ImageProcessor.with_options`; where: what to call it in errors.
    """

    source: Any
    options: Mapping[str, Any] = field(default_factory=dict)
    where: str = "the image"


@dataclass(frozen=True, eq=False)
class VideoPart(ImagePart):
    """A video in an image's place. source: see `vision.load_video`; options: see `VideoRule.with_options`."""


MADE: Mapping[str, tuple[type[ImagePart], str]] = {
    "images": (ImagePart, "image"),
    "videos": (VideoPart, "video"),
}


def normalise_messages(messages: Sequence[Mapping[str, Any]], *, images: bool = False) -> list[Message]:
    """Copies of the messages with text as one string and tool arguments as objects.

    Text parts are joined by newlines. Keys that are None are left out, as in transformers: templates handle
    what is missing, and print None as a word. Missing content is "", except beside tool calls. Arguments that
    are no JSON object stay a text: models write such calls, and the conversation in which one is told so must
    go on.
    images: whether the model takes any. Then the content of a message with images is a list of texts and
        `ImagePart`s, in order; the user's messages and those of tools may have some. Where its texts have
        `IMAGE_TOKEN`s, these are the images' places.
    Raises `RequestError` naming the message by its position.
    """
    if not messages:
        raise RequestError("A conversation needs at least one message.")
    return [_normalise(message, f"messages[{i}]", images) for i, message in enumerate(messages)]


def is_prefill(messages: Sequence[Message]) -> bool:
    """Whether the conversation ends in an answer by the assistant that the model is to continue."""
    return bool(messages) and messages[-1]["role"] == "assistant" and not messages[-1].get("tool_calls")


def _normalise(message: Mapping[str, Any], where: str, images: bool) -> Message:
    if not isinstance(message, Mapping):
        raise RequestError(
            f"{where} must be an object with 'role' and 'content', not {type(message).__name__}."
        )
    message = without_nulls(message)
    role = message.get("role")
    if role not in ROLES:
        raise RequestError(f"{where}: unknown role {role!r}. Use one of {', '.join(ROLES)}.")
    calls = _tool_calls(message.get("tool_calls"), where)
    if calls and role != "assistant":
        raise RequestError(f"{where}: only the assistant calls tools, not {role!r}.")
    rest = {key: value for key, value in _with_thought(message).items() if key != "tool_calls"}
    if "content" in message or not calls:
        content = rest["content"] = _content(message.get("content", ""), where, images)
        if isinstance(content, list) and role not in ILLUSTRATED:
            raise RequestError(
                f"{where}: images may stand in messages of the user and of tools, not of {role!r}."
            )
    return rest | {"tool_calls": calls} if calls else rest


def without_nulls(given: Mapping[str, Any]) -> dict[str, Any]:
    """What is said by it: a key that is null says as much as one that is not there."""
    return {key: value for key, value in given.items() if value is not None}


def _with_thought(message: Mapping[str, Any]) -> Message:
    """A thought goes by three names. Templates read the first one, gpt-oss's the second; so in HF."""
    thought = next((message[name] for name in REASONING_FIELDS if name in message), None)
    return (
        dict(message) if thought is None else {"thinking": thought, **message, "reasoning_content": thought}
    )


def _content(content: Any, where: str, images: bool) -> str | list[str | ImagePart]:
    if isinstance(content, str):
        return content
    if isinstance(content, Sequence):
        parts = [_part(part, f"{where}.content[{i}]", images) for i, part in enumerate(content)]
        texts = [part for part in parts if isinstance(part, str)]
        return "\n".join(texts) if len(texts) == len(parts) else _placed(parts, where)
    raise RequestError(f"{where}.content must be a text or a list of parts, not {type(content).__name__}.")


def _placed(parts: list[str | ImagePart], where: str) -> list[str | ImagePart]:
    """The parts with the images where the texts say, if they do."""
    images = [part for part in parts if isinstance(part, ImagePart)]
    texts = [part for part in parts if isinstance(part, str)]
    count = sum(text.count(IMAGE_TOKEN) for text in texts)
    if not count:
        return parts
    if count != len(images):
        raise RequestError(
            f"{where}: the number of {IMAGE_TOKEN} is not equal to input images, {count} vs {len(images)}."
        )
    pieces = [piece for text in texts for piece in re.split(f"({re.escape(IMAGE_TOKEN)})", text)]
    rest = iter(images)
    return [next(rest) if piece == IMAGE_TOKEN else piece for piece in pieces if piece]


def _part(part: Any, where: str, images: bool) -> str | ImagePart:
    if isinstance(part, str):
        return part
    if isinstance(part, ImagePart):  # a protocol with a form of its own has read it
        if images:
            return part
        raise _unsupported("images", part.where)
    if not isinstance(part, Mapping):
        raise RequestError(f"{where} must be an object with a 'type', not {type(part).__name__}.")
    kind = part.get("type", "text" if "text" in part else None)
    if isinstance(kind, str) and kind in MEDIA_PARTS:
        if images and MEDIA_PARTS[kind] in MADE:
            return _media(part, kind, where)
        raise _unsupported(MEDIA_PARTS[kind], where)
    text = part.get("refusal" if kind == "refusal" else "text")
    if kind not in TEXT_PARTS or not isinstance(text, str):
        problem = (
            f"{kind}={text!r:.100} is no text"
            if kind in TEXT_PARTS
            else f"a part of type {kind!r} is not supported"
        )
        raise RequestError(f"{where}: {problem}. Use {{'type': 'text', 'text': ...}}.", param=where)
    return text


def _unsupported(media: str, where: str) -> RequestError:
    verb = "is" if media == "audio" else "are"
    return RequestError(f"{where}: {media} {verb} not supported by this model.", param=where)


def _media(part: Mapping[str, Any], kind: str, where: str) -> ImagePart:
    """LMDeploy's and OpenAI's forms: the source itself, or an object with `url` or `data` and options."""
    made, one = MADE[MEDIA_PARTS[kind]]
    names = (kind, f"{one}_url", one, "url", "path", "data")
    key = next((name for name in names if part.get(name) is not None), None)
    given = None if key is None else part[key]
    options = {name: value for name, value in part.items() if name not in ("type", key)}
    if isinstance(given, Mapping):
        inner = next((name for name in ("url", "data", "path") if given.get(name) is not None), None)
        options |= {name: value for name, value in given.items() if name != inner}
        given = None if inner is None else given[inner]
    if given is None:
        raise RequestError(
            f"{where}: no {one}. Use {{'type': '{one}_url', '{one}_url': {{'url': ...}}}}.", param=where
        )
    return made(given, without_nulls(options), where)


def _tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    if not calls:
        return []
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise RequestError(f"{where}.tool_calls must be a list, not {type(calls).__name__}.")
    return [_tool_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(calls)]


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise RequestError(f"{where} must be an object with a 'function' that has a 'name' and 'arguments'.")
    arguments = _arguments(function.get("arguments"), where)
    return {**without_nulls(call), "function": {**without_nulls(function), "arguments": arguments}}


def _arguments(arguments: Any, where: str) -> dict[str, Any] | str:
    """Text is opaque in OpenAI's protocol; templates want an object where it is one."""
    if arguments is None:
        return {}
    if isinstance(arguments, str):
        return _object(arguments)
    if not isinstance(arguments, Mapping):
        raise RequestError(
            f"{where}.function.arguments must be a JSON object, not {type(arguments).__name__}."
        )
    return dict(arguments)


def _object(text: str) -> dict[str, Any] | str:
    try:
        value = json.loads(text) if text.strip() else {}
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, dict) else text
