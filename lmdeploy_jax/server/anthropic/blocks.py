"""Content blocks as what a model reads: texts and images."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import Any
from xml.sax.saxutils import quoteattr

from lmdeploy_jax.errors import RequestError
from lmdeploy_jax.text.conversation import ImagePart

# What tools of Anthropic's have done earlier in the conversation is told to the model as JSON.
_EARLIER = ("server_tool_use", "mcp_tool_use", "compaction")
_NOT_FOR_READING = ("type", "id", "tool_use_id", "data", "signature", "cache_control", "caller")


def seen(block: Any, where: str) -> str | ImagePart:
    """A text or an image. where: the block, as errors name it. Raises `RequestError`."""
    if not isinstance(block, Mapping) or block.get("type") != "image":
        return read(block, where)
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


def read(block: Any, where: str) -> str:
    """The text that a block holds. Raises `RequestError` for one that holds none."""
    match block:
        case {"type": "text", "text": str(text)}:
            return text
        case {"type": "document"}:
            return _tagged("document", block, _document(block.get("source"), where))
        case {"type": "search_result", "content": list(parts)}:
            return _tagged("search_result", block, _joined(parts, f"{where}.content"))
        case {"type": str(kind)} if kind in _EARLIER or kind.endswith("_tool_result"):
            return f"[{kind}: {json.dumps(_readable(block), ensure_ascii=False)}]\n"
    found = block.get("type") if isinstance(block, Mapping) else block
    raise RequestError(
        f"{where}: a content block of type {found!r} is not supported: this server reads text, image, "
        "document, search_result, tool_use, tool_result and thinking.",
        param=where,
    )


def _document(source: Any, where: str) -> str:
    match source:
        case {"type": "text", "data": str(text)}:
            return text
        case {"type": "content", "content": str(text)}:
            return text
        case {"type": "content", "content": list(parts)}:
            return _joined(parts, f"{where}.source.content")
        case {"type": "base64", "media_type": str(kind), "data": str(data)} if kind.startswith("text/"):
            try:
                return base64.b64decode(data, validate=True).decode()
            except ValueError:  # no base64, or no UTF-8
                pass
    found = source.get("media_type", source.get("type")) if isinstance(source, Mapping) else source
    raise RequestError(
        f"{where}.source: a document of {found!r} cannot be read here; send its text, as "
        "{'type': 'text', 'media_type': 'text/plain', 'data': ...}.",
        param=f"{where}.source",
    )


def _joined(parts: list[Any], where: str) -> str:
    return "\n".join(read(part, f"{where}[{i}]") for i, part in enumerate(parts))


def _tagged(tag: str, block: Mapping[str, Any], text: str) -> str:
    """The text between tags that tell what it is called and where it is from."""
    named = [
        (name, block[name]) for name in ("title", "source", "context") if isinstance(block.get(name), str)
    ]
    attributes = "".join(f" {name}={quoteattr(value)}" for name, value in named)
    return f"<{tag}{attributes}>\n{text}\n</{tag}>"


def _readable(value: Any) -> Any:
    """Without what only another server can read."""
    match value:
        case dict():
            said = {k: v for k, v in value.items() if k not in _NOT_FOR_READING and "encrypted" not in k}
            return {name: _readable(inner) for name, inner in said.items()}
        case list():
            return [_readable(inner) for inner in value]
    return value
