"""Answers in the shape of OpenAI's chat completions: chunks of a stream, and whole."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from lmdeploy_jax.server.chat.answers import Answers
from lmdeploy_jax.server.chat.custom_tools import InputReader, input_of
from lmdeploy_jax.server.chat.deltas import Answer, Delta
from lmdeploy_jax.server.errors import choice_error
from lmdeploy_jax.server.http.sse import data
from lmdeploy_jax.server.ids import ToolCallIds, new_id, now
from lmdeploy_jax.server.logprobs import chat_logprobs, sampled_logprobs
from lmdeploy_jax.server.openai_chat.bodies import ChatCompletionRequest
from lmdeploy_jax.server.openai_chat.prompt import custom_names
from lmdeploy_jax.server.usage import Usage, openai_usage
from lmdeploy_jax.text.parsers import (
    ContentDelta,
    Event,
    ReasoningDelta,
    ToolCall,
    ToolCallArguments,
    ToolCallBroken,
    ToolCallStart,
)
from lmdeploy_jax.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class ChatShape:
    """What of an answer is told, and under which name.

    top_logprobs: None for no log-probabilities. return_logprob, return_token_ids: LMDeploy's extensions.
    reasons: every delta has the key `reasoning_content`, as in LMDeploy, whose programs read it from all.
    custom: names of custom tools.
    """

    id: str
    created: int
    model: str
    tokenizer: Tokenizer
    top_logprobs: int | None = None
    return_logprob: bool = False
    return_token_ids: bool = False
    include_usage: bool = False
    reasons: bool = False
    custom: frozenset[str] = frozenset()


def chat_shape(
    body: ChatCompletionRequest, model: str, tokenizer: Tokenizer, *, reasons: bool = False
) -> ChatShape:
    """What the request asks to be told of. reasons: whether answers are looked through for reasoning."""
    return ChatShape(
        id=new_id("chatcmpl"),
        created=now(),
        model=model,
        tokenizer=tokenizer,
        top_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        return_logprob=body.return_logprob,
        return_token_ids=body.return_token_ids,
        include_usage=body.stream_options is not None and body.stream_options.include_usage,
        reasons=reasons,
        custom=custom_names(body),
    )


@dataclass
class ChunkWriter:
    """Writes a stream's chunks. The parts that stay the same are rendered once."""

    shape: ChatShape
    call_ids: ToolCallIds
    _begun: set[int] = field(default_factory=set)
    _inputs: dict[tuple[int, int], InputReader] = field(default_factory=dict)  # of calls of custom tools

    def __post_init__(self) -> None:
        shape = self.shape
        head = {
            "id": shape.id,
            "object": "chat.completion.chunk",
            "created": shape.created,
            "model": shape.model,
        }
        usage = b',"usage":null' if shape.include_usage else b""
        self._head = b"data: " + orjson.dumps(head)[:-1] + b',"choices":[{"index":'
        self._tail = b"}]" + usage + b"}\n\n"
        no_thought = b'"reasoning_content":null}' if shape.reasons else b"}"
        self._empty = b"{" + no_thought
        self._end = (b"," if shape.reasons else b"") + no_thought
        self._plain = not (shape.return_logprob or shape.return_token_ids or shape.top_logprobs is not None)

    async def chunks(self, answers: Answers) -> AsyncGenerator[bytes, None]:
        """The stream's body: all chunks that come together as one piece of it."""
        async for deltas in answers:
            yield b"".join([chunk for delta in deltas for chunk in self._chunks(delta)])
        if self.shape.include_usage:
            yield self._usage(answers.usage)

    def _chunks(self, delta: Delta) -> list[bytes]:
        chunks = []
        if delta.choice not in self._begun:
            self._begun.add(delta.choice)
            chunks.append(self._chunk(delta.choice, self._delta(b'"role":"assistant","content":""')))
        extra = b"" if self._plain else self._extras(delta)
        events = delta.events
        for event in events[:-1]:
            chunks.append(self._chunk(delta.choice, self._said(delta.choice, event)))
        if events or extra:
            said = self._said(delta.choice, events[-1]) if events else self._empty
            chunks.append(self._chunk(delta.choice, said, extra))
        if delta.finish is not None:
            finish: dict[str, Any] = {"finish_reason": delta.finish.reason} | choice_error(delta.finish.error)
            if delta.finish.stop_match is not None:
                finish |= {"stop_reason": delta.finish.stop_match}
            chunks.append(self._chunk(delta.choice, self._empty, b"," + orjson.dumps(finish)[1:-1], b""))
        return chunks

    def _chunk(
        self, choice: int, said: bytes, extra: bytes = b"", finish: bytes = b',"finish_reason":null'
    ) -> bytes:
        return b"".join((self._head, b"%d" % choice, b',"delta":', said, extra, finish, self._tail))

    def _said(self, choice: int, event: Event) -> bytes:
        match event:
            case ContentDelta(text):
                return self._delta(b'"content":' + orjson.dumps(text))
            case ReasoningDelta(text):
                return b'{"reasoning_content":' + orjson.dumps(text) + b"}"
            case ToolCallStart(index, name) if name in self.shape.custom:
                self._inputs[choice, index] = InputReader()
                custom = {"name": name, "input": ""}
                call = {"index": index, "id": self.call_ids.new(), "type": "custom", "custom": custom}
                return self._delta(b'"tool_calls":' + orjson.dumps([call]))
            case ToolCallArguments(index, arguments) if (choice, index) in self._inputs:
                call = {"index": index, "custom": {"input": self._inputs[choice, index].add(arguments)}}
                return self._delta(b'"tool_calls":' + orjson.dumps([call]))
            case ToolCallStart(index, name):
                function = {"name": name, "arguments": ""}
                call = {"index": index, "id": self.call_ids.new(), "type": "function", "function": function}
                return self._delta(b'"tool_calls":' + orjson.dumps([call]))
            case ToolCallArguments(index, arguments):
                call = {"index": index, "function": {"arguments": arguments}}
                return self._delta(b'"tool_calls":' + orjson.dumps([call]))
            case ToolCallBroken():
                return self._empty  # what was sent of it stays sent: the finish reason tells

    def _delta(self, said: bytes) -> bytes:
        return b"{" + said + self._end

    def _extras(self, delta: Delta) -> bytes:
        fields = extras(self.shape, delta.token_ids, delta.logprobs) if delta.token_ids else {}
        return b"," + orjson.dumps(fields)[1:-1] if fields else b""

    def _usage(self, usage: Usage) -> bytes:
        shape = self.shape
        return data(
            {
                "id": shape.id,
                "object": "chat.completion.chunk",
                "created": shape.created,
                "model": shape.model,
                "choices": [],
                "usage": openai_usage(usage),
            }
        )


def completion(
    shape: ChatShape, answers: Sequence[Answer], usage: Usage, call_ids: ToolCallIds
) -> dict[str, Any]:
    """The complete answers as one object."""
    return {
        "id": shape.id,
        "object": "chat.completion",
        "created": shape.created,
        "model": shape.model,
        "choices": [_choice(shape, answer, call_ids) for answer in answers],
        "usage": openai_usage(usage),
    }


def _choice(shape: ChatShape, answer: Answer, call_ids: ToolCallIds) -> dict[str, Any]:
    parsed = answer.parsed
    calls = [{"id": call_ids.new(), **_call(shape, call)} for call in parsed.tool_calls]
    message = {
        "role": "assistant",
        "content": parsed.content or (None if calls or parsed.reasoning else ""),
        "reasoning_content": parsed.reasoning or None,
        "tool_calls": calls or None,
        "refusal": None,
    }
    return {
        "index": answer.choice,
        "message": message,
        "logprobs": None,
        "finish_reason": answer.finish.reason,
        "stop_reason": answer.finish.stop_match,
    } | (choice_error(answer.finish.error) | extras(shape, answer.token_ids, answer.logprobs))


def _call(shape: ChatShape, call: ToolCall) -> dict[str, Any]:
    if call.name in shape.custom:
        return {"type": "custom", "custom": {"name": call.name, "input": input_of(call.arguments)}}
    return {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def extras(shape: ChatShape, ids: Sequence[int], logprobs: list[dict[int, float]] | None) -> dict[str, Any]:
    """What a request may ask for beside the text."""
    found: dict[str, Any] = {}
    if shape.top_logprobs is not None and logprobs is not None:
        content = chat_logprobs(shape.tokenizer, ids, logprobs, shape.top_logprobs)
        found["logprobs"] = {"content": content, "refusal": None}
    if shape.return_logprob and logprobs is not None:
        found["output_token_logprobs"] = sampled_logprobs(ids, logprobs)
    if shape.return_token_ids:
        found["output_ids"] = list(ids)
    return found
