"""Answers in the shape of Anthropic's messages: whole, and as a stream of events."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

from lmdeploy_jax.server.anthropic.bodies import MessagesRequest
from lmdeploy_jax.server.anthropic.prompt import RAW_ARGUMENTS
from lmdeploy_jax.server.chat.answers import Answers
from lmdeploy_jax.server.chat.deltas import Answer, Delta, Finish
from lmdeploy_jax.server.errors import ApiError, as_api_error
from lmdeploy_jax.server.http.request_ids import REQUEST_ID
from lmdeploy_jax.server.http.sse import event
from lmdeploy_jax.server.ids import ToolCallIds
from lmdeploy_jax.server.logprobs import sampled_logprobs
from lmdeploy_jax.server.usage import Usage
from lmdeploy_jax.text.parsers import (
    ContentDelta,
    Event,
    ReasoningDelta,
    ToolCallArguments,
    ToolCallBroken,
    ToolCallStart,
)

NO_THREADS = "thread_unsupported_request"  # by this code clients know that they can go on without
SIGNATURE = "lmdeploy_jax"  # clients want one; the text is not signed
_REASONS = {
    "length": "max_tokens",
    "tool_calls": "tool_use",
    "parse_error": "parse_error",
    "error": "error",
}  # others are an end of turn
_ERRORS = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def error_body(error: ApiError) -> dict[str, Any]:
    """Anthropic's error object."""
    usual = "api_error" if error.status >= 500 else "invalid_request_error"
    told: dict[str, Any] = {"type": _ERRORS.get(error.status, usual), "message": error.message}
    if error.code:
        told["code"] = error.code
    if error.code == NO_THREADS:
        told["details"] = {"error_code": error.code, "unsupported": [error.param]}
    return {"type": "error", "error": told, "request_id": REQUEST_ID.get() or None}


@dataclass
class Tokens:
    """An answer's tokens, as far as the request asks for them: LMDeploy's extensions."""

    ids: list[int] | None
    logprobs: list[list[float]] | None

    @classmethod
    def asked(cls, body: MessagesRequest) -> Tokens:
        return cls([] if body.return_token_ids else None, [] if body.return_logprob else None)

    def add(self, said: Answer | Delta) -> None:
        if self.ids is not None:
            self.ids += said.token_ids
        if self.logprobs is not None and said.logprobs is not None:
            self.logprobs += sampled_logprobs(said.token_ids, said.logprobs)

    @property
    def told(self) -> dict[str, Any]:
        fields = {"output_ids": self.ids, "output_token_logprobs": self.logprobs}
        return {name: value for name, value in fields.items() if value is not None}


def message(
    id: str, model: str, answer: Answer, usage: Usage, call_ids: ToolCallIds, tokens: Tokens
) -> dict[str, Any]:
    """A complete answer."""
    tokens.add(answer)
    parsed = answer.parsed
    content: list[dict[str, Any]] = []
    if parsed.reasoning:
        content.append({"type": "thinking", "thinking": parsed.reasoning, "signature": SIGNATURE})
    if parsed.content:
        content.append({"type": "text", "text": parsed.content})
    for call in parsed.tool_calls:
        content.append(_tool_use(call_ids.new(), call.name, _input(call.arguments)))
    error = answer.finish.error
    failed = {} if error is None else {"error": error_body(error)["error"]}
    return _envelope(id, model, usage) | {"content": content} | _ending(answer.finish) | failed | tokens.told


@dataclass
class EventWriter:
    """Writes the events of one streamed answer."""

    id: str
    model: str
    call_ids: ToolCallIds
    tokens: Tokens
    _index: int = -1  # of the block that is being written
    _block: tuple[str, int] | None = None  # its kind, and which call it is
    _begun: bool = field(default=False)

    async def events(self, answers: Answers) -> AsyncGenerator[bytes, None]:
        """The stream's body. An error becomes its last event."""
        try:
            async for deltas in answers:
                for delta in deltas:
                    yield self._write(delta, answers.usage)
        except Exception as error:
            yield self._error(as_api_error(error))

    def _write(self, delta: Delta, usage: Usage) -> bytes:
        """The events of what the answer has gained. The last ones come with its finish."""
        self.tokens.add(delta)
        parts = [] if self._begun else [self._start(usage)]
        for said in delta.events:
            parts += self._event(said)
        if delta.finish is not None and delta.finish.error is not None:
            parts.append(self._error(delta.finish.error))
        elif delta.finish is not None:
            parts += self._end(delta.finish, usage)
        return b"".join(parts)

    def _error(self, error: ApiError) -> bytes:
        return b"".join([*self._close(), event("error", error_body(error))])

    def _start(self, usage: Usage) -> bytes:
        self._begun = True
        empty = _envelope(self.id, self.model, usage) | {"stop_reason": None, "stop_sequence": None}
        return event("message_start", {"type": "message_start", "message": empty})

    def _event(self, said: Event) -> list[bytes]:
        match said:
            case ReasoningDelta(text):
                start = {"type": "thinking", "thinking": "", "signature": ""}
                opened = self._open(("thinking", 0), start)
                return [*opened, self._delta({"type": "thinking_delta", "thinking": text})]
            case ContentDelta(text):
                opened = self._open(("text", 0), {"type": "text", "text": ""})
                return [*opened, self._delta({"type": "text_delta", "text": text})]
            case ToolCallStart(index, name):
                return self._open(("tool_use", index), _tool_use(self.call_ids.new(), name, {}))
            case ToolCallArguments(_, arguments):
                return [self._delta({"type": "input_json_delta", "partial_json": arguments})]
            case ToolCallBroken():
                return self._close()  # what was sent of it stays sent: the stop reason tells

    def _open(self, block: tuple[str, int], start: dict[str, Any]) -> list[bytes]:
        """Begin a block, unless it is the one that is being written."""
        if block == self._block:
            return []
        closed = self._close()
        self._block, self._index = block, self._index + 1
        body = {"type": "content_block_start", "index": self._index, "content_block": start}
        return [*closed, event("content_block_start", body)]

    def _close(self) -> list[bytes]:
        if self._block is None:
            return []
        signed = []
        if self._block[0] == "thinking":
            signed = [self._delta({"type": "signature_delta", "signature": SIGNATURE})]
        self._block = None
        stop = event("content_block_stop", {"type": "content_block_stop", "index": self._index})
        return [*signed, stop]

    def _delta(self, delta: dict[str, Any]) -> bytes:
        body = {"type": "content_block_delta", "index": self._index, "delta": delta}
        return event("content_block_delta", body)

    def _end(self, finish: Finish, usage: Usage) -> list[bytes]:
        body = {"type": "message_delta", "delta": _ending(finish), "usage": _usage(usage)} | self.tokens.told
        stop = event("message_stop", {"type": "message_stop"})
        return [*self._close(), event("message_delta", body), stop]


def _envelope(id: str, model: str, usage: Usage) -> dict[str, Any]:
    return {
        "id": id,
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": [],
        "usage": _usage(usage),
    }


def _ending(finish: Finish) -> dict[str, Any]:
    """A stop string that the request named is told by name; the model's own end is an end of turn."""
    if finish.reason == "stop" and isinstance(finish.stop_match, str):
        return {"stop_reason": "stop_sequence", "stop_sequence": finish.stop_match}
    return {"stop_reason": _REASONS.get(finish.reason, "end_turn"), "stop_sequence": None}


def _usage(usage: Usage) -> dict[str, Any]:
    """The prompt's tokens from the cache are counted apart, as Anthropic does."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_read_input_tokens": usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "output_tokens": usage.completion_tokens,
    }


def _tool_use(id: str, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"type": "tool_use", "id": id, "name": name, "input": arguments}


def _input(arguments: str) -> dict[str, Any]:
    """A call's arguments; those of a call that was cut off are given as the text they are."""
    try:
        return dict(json.loads(arguments))
    except ValueError:
        return {RAW_ARGUMENTS: arguments}
