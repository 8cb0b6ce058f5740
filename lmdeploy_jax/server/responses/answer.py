"""Answers in the shape of the Responses protocol: whole, and as a stream of numbered events."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any

from lmdeploy_jax.server.chat.answers import Answers
from lmdeploy_jax.server.chat.custom_tools import input_of
from lmdeploy_jax.server.chat.deltas import Answer, Delta, Finish
from lmdeploy_jax.server.errors import ApiError, as_api_error
from lmdeploy_jax.server.http.sse import event
from lmdeploy_jax.server.ids import ToolCallIds
from lmdeploy_jax.server.responses.bodies import ResponsesRequest
from lmdeploy_jax.server.responses.prompt import Conversation
from lmdeploy_jax.server.responses.text_logprobs import Entry, TextLogprobs
from lmdeploy_jax.server.responses.tools import Toolbox
from lmdeploy_jax.server.usage import Usage
from lmdeploy_jax.text.parsers import (
    ContentDelta,
    Event,
    ReasoningDelta,
    ToolCallArguments,
    ToolCallBroken,
    ToolCallStart,
)

Item = dict[str, Any]
CALL_IDS = ToolCallIds("call_")
_CUT_BY = {"length": "max_output_tokens", "parse_error": "parse_error"}  # how an incomplete one ended
_ITEM_IDS = {name: ToolCallIds(f"{name}_") for name in ("msg", "rs", "fc", "ctc")}


@dataclass(frozen=True)
class ResponseShape:
    """What a response says of its request."""

    id: str
    created: int
    model: str
    body: ResponsesRequest
    toolbox: Toolbox

    def render(
        self,
        status: str,
        output: list[Item],
        usage: Usage | None = None,
        error: ApiError | None = None,
        cut_by: str | None = None,
    ) -> dict[str, Any]:
        """The response object. cut_by: why it is incomplete."""
        body = self.body
        asked = body.model_dump(by_alias=True, exclude_none=True, include={"tools", "tool_choice", "text"})
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "background": False,
            "error": error and {"code": error.code or "server_error", "message": error.message},
            "incomplete_details": cut_by and {"reason": cut_by},
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": self.model,
            "output": output,
            "parallel_tool_calls": body.parallel_tool_calls,
            "previous_response_id": body.previous_response_id,
            "reasoning": {"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
            "store": body.store,
            "temperature": body.temperature,
            "text": asked.get("text") or {"format": {"type": "text"}},
            "tool_choice": asked.get("tool_choice", "auto"),
            "tools": asked.get("tools", []),
            "top_logprobs": body.top_logprobs or 0,
            "top_p": body.top_p,
            "truncation": "disabled",
            "usage": usage and usage_body(usage),
            "user": body.user,
        }

    def ended(self, finish: Finish, output: list[Item], usage: Usage) -> dict[str, Any]:
        """The response object of an answer that has ended so."""
        return self.render(status_of(finish), output, usage, finish.error, _CUT_BY.get(finish.reason))


def usage_body(usage: Usage) -> dict[str, Any]:
    """This protocol's object of token counts."""
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def status_of(finish: Finish) -> str:
    """The status of a response whose answer ended so."""
    if finish.reason in _CUT_BY:
        return "incomplete"
    return {"abort": "cancelled", "error": "failed"}.get(finish.reason, "completed")


def _item_status(finish: Finish) -> str:
    """That of the last item. What a malformed call left behind is whole: text."""
    return "completed" if finish.reason in ("stop", "tool_calls", "parse_error") else "incomplete"


def output_items(answer: Answer, toolbox: Toolbox, logprobs: list[Entry]) -> list[Item]:
    """A complete answer as items. toolbox: the tools of its request; logprobs: its text's."""
    parsed, done = answer.parsed, _item_status(answer.finish)
    items = [_filled(_new_item("reasoning"), parsed.reasoning, done)] if parsed.reasoning else []
    if parsed.content or not (items or parsed.tool_calls):
        items.append(_filled(_new_item("message"), parsed.content, done, logprobs))
    for call in parsed.tool_calls:
        items.append(_filled(_new_call(call.name, toolbox), call.arguments, done))
    return items


_PREFIX = {"message": "msg", "reasoning": "rs", "function_call": "fc", "custom_tool_call": "ctc"}
_PARTS = ("message", "reasoning")  # items that have content parts


def _new_item(kind: str) -> Item:
    item: Item = {"id": _ITEM_IDS[_PREFIX[kind]].new(), "type": kind, "status": "in_progress"}
    if kind == "message":
        return item | {"role": "assistant", "content": []}
    return item | ({"summary": [], "content": []} if kind == "reasoning" else {})


def _new_call(called: str, toolbox: Toolbox) -> Item:
    """A call by the name that the client gave the tool."""
    tool = toolbox.get(called)
    custom = tool is not None and tool.is_custom
    item = _new_item("custom_tool_call" if custom else "function_call")
    item |= {"call_id": CALL_IDS.new(), "name": tool.name if tool else called}
    item |= {"namespace": tool.namespace} if tool and tool.namespace else {}
    return item | ({"input": ""} if custom else {"arguments": ""})


def _part(kind: str, text: str, logprobs: Sequence[Entry] = ()) -> dict[str, Any]:
    if kind == "reasoning":
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": list(logprobs)}


def _filled(item: Item, text: str, status: str, logprobs: Sequence[Entry] = ()) -> Item:
    if item["type"] == "function_call":
        return item | {"arguments": text, "status": status}
    if item["type"] == "custom_tool_call":
        return item | {"input": input_of(text), "status": status}
    return item | {"content": [_part(item["type"], text, logprobs)], "status": status}


@dataclass
class ResponseWriter:
    """Writes the events of one streamed response. `items` holds what has been said when it has ended."""

    shape: ResponseShape
    conversation: Conversation
    logprobs: TextLogprobs
    items: list[Item] = field(default_factory=list)
    _number: int = 0
    _item: Item | None = None  # the one that is being written
    _text: str = ""
    _told: list[Entry] = field(default_factory=list)  # of its tokens

    async def events(self, answers: Answers) -> AsyncGenerator[bytes, None]:
        """The stream's body. An error becomes its last event."""
        finish = Finish("stop")
        yield self._begin()
        try:
            async for deltas in answers:
                for delta in deltas:
                    yield self._write(delta)
                    finish = delta.finish or finish
            response = self.shape.ended(finish, self.items, answers.usage)
            if finish.error is None:
                self.conversation.keep(response)
            yield self._end(response)
        except Exception as error:
            yield self._error(as_api_error(error))

    def _begin(self) -> bytes:
        response = self.shape.render("in_progress", [])
        return self._event("response.created", response=response) + self._event(
            "response.in_progress", response=response
        )

    def _write(self, delta: Delta) -> bytes:
        parts = list(map(self._said, delta.events, self.logprobs.read(delta)))
        if delta.finish is not None:
            if not self.items and self._item is None:
                parts.append(self._open("message"))  # an answer has an item, if only an empty one
            parts.append(self._close(_item_status(delta.finish)))
        return b"".join(parts)

    def _end(self, response: dict[str, Any]) -> bytes:
        name = {"completed": "completed", "failed": "failed"}.get(response["status"], "incomplete")
        return self._event(f"response.{name}", response=response)

    def _error(self, error: ApiError) -> bytes:
        """The last event of a response that there is no answer to."""
        closed = self._close("incomplete")
        return closed + self._event(
            "response.failed", response=self.shape.render("failed", self.items, error=error)
        )

    def _said(self, said: Event, logprobs: list[Entry]) -> bytes:
        match said:
            case ReasoningDelta(text):
                return self._open("reasoning") + self._delta("response.reasoning_text.delta", text)
            case ContentDelta(text):
                return self._open("message") + self._text_delta(text, logprobs)
            case ToolCallStart(_, name):
                return self._close("completed") + self._start(_new_call(name, self.shape.toolbox))
            case ToolCallArguments(_, arguments):
                return self._delta("response.function_call_arguments.delta", arguments)
            case ToolCallBroken():
                return self._close("incomplete")  # what was sent of it stays sent: the status tells

    def _open(self, kind: str) -> bytes:
        """Begin an item, unless it is the one that is being written."""
        if self._item is not None and self._item["type"] == kind:
            return b""
        return self._close("completed") + self._start(_new_item(kind))

    def _start(self, item: Item) -> bytes:
        self._item, self._text, self._told = item, "", []
        started = self._event("response.output_item.added", output_index=len(self.items), item=item)
        if item["type"] not in _PARTS:
            return started
        return started + self._of_part("response.content_part.added", part=_part(item["type"], ""))

    def _delta(self, name: str, text: str) -> bytes:
        assert self._item is not None
        self._text += text
        if self._item["type"] == "custom_tool_call":
            return b""  # its input is known once the arguments are whole
        if self._item["type"] == "function_call":
            return self._of_item(name, delta=text)
        return self._of_part(name, delta=text)

    def _text_delta(self, text: str, logprobs: list[Entry]) -> bytes:
        self._text += text
        self._told += logprobs
        return self._of_part("response.output_text.delta", delta=text, logprobs=logprobs)

    def _close(self, status: str) -> bytes:
        """End the item that is being written, if there is one."""
        if self._item is None:
            return b""
        item = _filled(self._item, self._text, status, self._told)
        parts = self._done(item)
        parts += self._event("response.output_item.done", output_index=len(self.items), item=item)
        self.items.append(item)
        self._item = None
        return parts

    def _done(self, item: Item) -> bytes:
        if item["type"] == "function_call":
            name = "response.function_call_arguments.done"
            return self._of_item(name, name=item["name"], arguments=self._text)
        if item["type"] == "custom_tool_call":
            delta = self._of_item("response.custom_tool_call_input.delta", delta=item["input"])
            return delta + self._of_item("response.custom_tool_call_input.done", input=item["input"])
        if item["type"] == "reasoning":
            text = self._of_part("response.reasoning_text.done", text=self._text)
        else:
            text = self._of_part("response.output_text.done", text=self._text, logprobs=self._told)
        return text + self._of_part("response.content_part.done", part=item["content"][0])

    def _of_item(self, event_name: str, /, **values: Any) -> bytes:
        assert self._item is not None
        return self._event(event_name, item_id=self._item["id"], output_index=len(self.items), **values)

    def _of_part(self, event_name: str, /, **values: Any) -> bytes:
        return self._of_item(event_name, content_index=0, **values)

    def _event(self, event_name: str, /, **values: Any) -> bytes:
        body = {"type": event_name, "sequence_number": self._number} | values
        self._number += 1
        return event(event_name, body)
