"""The incremental parser of answers: pieces of text in; reasoning, content and tool calls out."""

from __future__ import annotations

from itertools import count
from typing import Protocol

from lmdeploy_jax.errors import ConfigError
from lmdeploy_jax.text.parsers.block import Block, ReasoningFormat, Schemas, ToolFormat, ViolationError
from lmdeploy_jax.text.parsers.events import ContentDelta, Event, ReasoningDelta, merge
from lmdeploy_jax.text.stop import StopMatcher

TextKind = type[ContentDelta] | type[ReasoningDelta]


class AnswerParser:
    """Parses one answer. However the text is cut, the events add up to the same `collect`ed answer.

    - A block that is not a call, or is cut off before the call's name and the beginning of its arguments are
      known, is text from its open tag on. It does not end the reasoning that it stands in.
    - A call that has been announced stays: where its block goes wrong or ends too early the call ends too,
      and what follows is content. So arguments are always JSON text or the beginning of it.
    - Space between two blocks, or between a block and the answer's end, belongs to the format and is dropped.
    - The open tag of reasoning counts at the answer's start and right after a block, not amid content.

    tool_schemas: tool name -> JSON schema of its parameters. Formats without types of their own coerce by it;
    formats without tags take only calls of these tools for calls.
    Raises `ConfigError` for an answer that starts in reasoning without a reasoning format.
    """

    def __init__(
        self,
        reasoning: ReasoningFormat | None,
        tools: ToolFormat | None,
        tool_schemas: Schemas | None = None,
        starts_in_reasoning: bool = False,
    ) -> None:
        if starts_in_reasoning and reasoning is None:
            raise ConfigError("starts_in_reasoning=True needs a reasoning format; name a reasoning parser.")
        self.reasoning = reasoning
        self.tools = tools
        self.schemas = tool_schemas
        self.events: list[Event] = []
        self.indices = count()
        self.mode: _Mode = _Edge(self, ReasoningDelta if starts_in_reasoning else ContentDelta, first=True)
        self._finished = False

    def feed(self, text: str) -> list[Event]:
        """Takes the next piece of the answer; returns what it adds. Raises `RuntimeError` after `finish`."""
        if self._finished:
            raise RuntimeError("The answer is finished; use a new AnswerParser for the next one.")
        self._read(text)
        return self._drain()

    def finish(self) -> list[Event]:
        """The answer has ended: what was held back comes out."""
        self._finished = True
        while text := self.mode.end():
            self._read(text)
        return self._drain()

    def enter(self, tag: str, before: str, kind: TextKind) -> None:
        """Goes where the tag leads. `before`: space held back, which is text if the tag opens nothing."""
        if self.reasoning and tag == self.reasoning.open:
            self.mode = _Edge(self, ReasoningDelta)
        elif self.reasoning and tag == self.reasoning.close and kind is ReasoningDelta:
            self.mode = _Edge(self, ContentDelta)
        else:
            self.mode = _InBlock(self, tag, before, kind)

    def _read(self, text: str) -> None:
        while text:
            text = self.mode.read(text)

    def _drain(self) -> list[Event]:
        events, self.events[:] = self.events[:], []  # the list is a block's too
        return merge(events) if len(events) > 1 else events


class _Mode(Protocol):
    def read(self, text: str) -> str:
        """Takes text; returns what another mode is to read."""

    def end(self) -> str:
        """Lets go of what is held back; returns what another mode is to read."""


class _Edge:
    """At the answer's start or right after a block: space is held back until what follows is known."""

    def __init__(self, parser: AnswerParser, kind: TextKind, first: bool = False) -> None:
        self._parser = parser
        self._kind = kind
        self._first = first
        self._tags = self._expected()
        self._space: list[str] = []
        self._body = ""  # the beginning of a tag

    def _expected(self) -> tuple[str, ...]:
        reasoning, tools = self._parser.reasoning, self._parser.tools
        tags = tools.open_tags if tools else ()
        if self._kind is ReasoningDelta:
            assert reasoning is not None
            return (*tags, reasoning.close, *((reasoning.open,) if self._first else ()))
        return (*tags, *(tools.edge_tags if tools else ()), *((reasoning.open,) if reasoning else ()))

    def read(self, text: str) -> str:
        for i, char in enumerate(text, start=1):
            if not self._body and char.isspace():
                self._space.append(char)
                continue
            self._body += char
            if self._body in self._tags:
                self._parser.enter(self._body, "".join(self._space), self._kind)
                return text[i:]
            if not any(tag.startswith(self._body) for tag in self._tags):
                self._parser.mode = _Text(self._parser, self._kind)
                return "".join(self._space) + self._body + text[i:]
        return ""

    def end(self) -> str:
        held = "".join(self._space) + self._body
        if held and (self._body or self._first):
            self._parser.events.append(self._kind(held))
        self._space.clear()
        self._body = ""
        return ""


class _Text:
    """Amid content or reasoning: everything is text but tags; what may become one is held back."""

    def __init__(self, parser: AnswerParser, kind: TextKind) -> None:
        self._parser = parser
        self._kind = kind
        tags = list(parser.tools.open_tags) if parser.tools else []
        if kind is ReasoningDelta and parser.reasoning:
            tags.append(parser.reasoning.close)
        self._matcher = StopMatcher(tags)
        self._held = 0  # characters

    def read(self, text: str) -> str:
        shown, tag = self._matcher.feed(text)
        self._say(shown)
        if tag is None:
            self._held += len(text) - len(shown)
            return ""
        self._parser.enter(tag, "", self._kind)
        return text[len(shown) + len(tag) - self._held :]

    def end(self) -> str:
        self._say(self._matcher.finish())
        return ""

    def _say(self, text: str) -> None:
        if text:
            self._parser.events.append(self._kind(text))


class _InBlock:
    """After an open tag: the format's grammar reads, one character at a time."""

    def __init__(self, parser: AnswerParser, tag: str, before: str, kind: TextKind) -> None:
        assert parser.tools is not None
        self._parser = parser
        self._kind = kind
        self._block = Block(tag, parser.schemas, parser.events, parser.indices, list(before + tag))
        self._grammar = parser.tools.read(self._block)
        next(self._grammar)

    def read(self, text: str) -> str:
        for i, char in enumerate(text):
            if self._ends_at(char):
                taken = self._block.pending is None
                return self._leave() + text[i + taken :]
        return ""

    def end(self) -> str:
        if not self._ends_at(""):
            raise RuntimeError(f"The grammar of {self._block.tag!r} reads on after the end of the answer.")
        return self._leave()

    def _ends_at(self, char: str) -> bool:
        try:
            self._grammar.send(char)
        except (StopIteration, ViolationError):
            return True
        return False

    def _leave(self) -> str:
        rest = "".join(self._block.raw)
        if self._block.committed:
            self._parser.mode = _Edge(self._parser, ContentDelta)
            return rest
        self._parser.events.append(self._kind(rest))
        self._parser.mode = _Text(self._parser, self._kind)
        return ""
