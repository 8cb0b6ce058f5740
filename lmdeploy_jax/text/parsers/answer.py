"""The incremental parser of answers: pieces of text in; reasoning, content and tool calls out."""

from __future__ import annotations

from itertools import count
from typing import Protocol

from lmdeploy_jax.errors import ConfigError
from lmdeploy_jax.text.parsers.block import Block, ReasoningFormat, Schemas, ToolFormat, ViolationError
from lmdeploy_jax.text.parsers.events import ContentDelta, Event, ReasoningDelta, ToolCallBroken, merge
from lmdeploy_jax.text.stop import StopMatcher

TextKind = type[ContentDelta] | type[ReasoningDelta]


class AnswerParser:
    """Parses one answer. However the text is cut, the events add up to the same `collect`ed answer.

    - A block that is not a call, or is cut off before the call's name and the beginning of its arguments are
      known, is text from its open tag on. It does not end the reasoning that it stands in.
    - A call that has been announced is taken back with a `ToolCallBroken` where its arguments go wrong or end
      too early, and then it is text likewise. Where they are whole it stays, and what follows is content.
    - `malformed` tells that there was one or the other. Of the first amid reasoning, which may well speak of
      tags, it does not.
    - Space between two blocks, or between a block and the answer's end, belongs to the format and is dropped.
      So do newlines around reasoning.
    - The open tag of reasoning counts at the answer's start and right after a block, not amid content.

    tool_schemas: tool name -> JSON schema of its parameters. Formats without types of their own coerce by it;
    formats without tags take only calls of these tools for calls.
    has_form: a grammar holds the content to a form, so that all behind the reasoning and its gap is content.
    Raises `ConfigError` for an answer that starts in reasoning without a reasoning format.
    """

    def __init__(
        self,
        reasoning: ReasoningFormat | None,
        tools: ToolFormat | None,
        tool_schemas: Schemas | None = None,
        starts_in_reasoning: bool = False,
        has_form: bool = False,
    ) -> None:
        if starts_in_reasoning and reasoning is None:
            raise ConfigError("starts_in_reasoning=True needs a reasoning format; name a reasoning parser.")
        self.reasoning = reasoning
        self.tools = tools
        self.schemas = tool_schemas
        self.events: list[Event] = []
        self.indices = count()
        self.malformed = False
        self.cut_off = False  # whether a limit, and not the model, ended the answer
        self._has_form = has_form
        self.mode: _Mode = _Edge(self, ReasoningDelta if starts_in_reasoning else ContentDelta, first=True)
        self._finished = False

    def feed(self, text: str) -> list[Event]:
        """Takes the next piece of the answer; returns what it adds. Raises `RuntimeError` after `finish`."""
        if self._finished:
            raise RuntimeError("The answer is finished; use a new AnswerParser for the next one.")
        self._read(text)
        return self._drain()

    def finish(self, cut_off: bool = False) -> list[Event]:
        """The answer has ended: what was held back comes out.

        cut_off: by a limit, so that a call that is not whole is the beginning of one, not a malformed one.
        """
        self._finished = True
        self.cut_off = cut_off
        while text := self.mode.end():
            self._read(text)
        return self._drain()

    def enter(self, tag: str, before: str, kind: TextKind) -> None:
        """Goes where the tag leads. `before`: space held back, which is text if the tag opens nothing."""
        if self.reasoning and tag == self.reasoning.open:
            self.mode = _Edge(self, ReasoningDelta, trims=True)
        elif self.reasoning and tag == self.reasoning.close and kind is ReasoningDelta:
            form = _Form(self, self.reasoning.gap) if self._has_form else None
            self.mode = form or _Edge(self, ContentDelta, trims=True)
        else:
            self.mode = _InBlock(self, tag, before, kind)

    def _read(self, text: str) -> None:
        while text:
            text = self.mode.read(text)

    def _drain(self) -> list[Event]:
        events, self.events[:] = self.events[:], []  # in place: blocks hold the same list
        return merge(events) if len(events) > 1 else events


class _Mode(Protocol):
    def read(self, text: str) -> str:
        """Takes text; returns what another mode is to read."""

    def end(self) -> str:
        """Lets go of what is held back; returns what another mode is to read."""


class _Edge:
    """At the answer's start or right after a block: space is held back until what follows is known.

    trims: whether newlines here belong to the format.
    """

    def __init__(
        self, parser: AnswerParser, kind: TextKind, first: bool = False, trims: bool = False
    ) -> None:
        self._parser = parser
        self._kind = kind
        self._first = first
        self._trims = trims or kind is ReasoningDelta
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
                self._parser.enter(self._body, self._lead(), self._kind)
                return text[i:]
            if not any(tag.startswith(self._body) for tag in self._tags):
                self._parser.mode = _Text(self._parser, self._kind)
                return self._lead() + self._body + text[i:]
        return ""

    def _lead(self) -> str:
        space = "".join(self._space)
        return space.lstrip("\n") if self._trims else space

    def end(self) -> str:
        held = self._lead() + self._body
        if held and (self._body or self._first):
            self._parser.events.append(self._kind(held))
        self._space.clear()
        self._body = ""
        return ""


class _Form:
    """Content that is held to a form: `gap` comes first, then everything counts."""

    def __init__(self, parser: AnswerParser, gap: str) -> None:
        self._parser = parser
        self._gap = gap

    def read(self, text: str) -> str:
        while text and self._gap.startswith(text[0]):
            text, self._gap = text[1:], self._gap[1:]
        if text:
            self._gap = ""
            self._parser.events.append(ContentDelta(text))
        return ""

    def end(self) -> str:
        return ""


class _Text:
    """Amid content or reasoning: everything is text but tags; what may become one is held back.

    So are newlines amid reasoning, which belong to the format where the close tag comes next.
    """

    def __init__(self, parser: AnswerParser, kind: TextKind) -> None:
        self._parser = parser
        self._kind = kind
        tags = list(parser.tools.open_tags) if parser.tools else []
        if kind is ReasoningDelta and parser.reasoning:
            tags.append(parser.reasoning.close)
        self._matcher = StopMatcher(tags)
        self._held = 0  # characters
        self._newlines = 0

    def read(self, text: str) -> str:
        shown, tag = self._matcher.feed(text)
        self.say(shown)
        if tag is None:
            self._held += len(text) - len(shown)
            return ""
        if not (self._parser.reasoning and tag == self._parser.reasoning.close):
            self._say_newlines()
        self._parser.enter(tag, "", self._kind)
        return text[len(shown) + len(tag) - self._held :]

    def end(self) -> str:
        self.say(self._matcher.finish())
        self._say_newlines()
        return ""

    def say(self, text: str) -> None:
        """Adds to the content or the reasoning."""
        if self._kind is ReasoningDelta:
            body = text.rstrip("\n")
            held = len(text) - len(body)
            text = "\n" * self._newlines + body if body else ""
            self._newlines = held if body else self._newlines + held
        if text:
            self._parser.events.append(self._kind(text))

    def _say_newlines(self) -> None:
        if self._newlines:
            self._parser.events.append(self._kind("\n" * self._newlines))
            self._newlines = 0


class _InBlock:
    """After an open tag: the format's grammar reads, one character at a time."""

    def __init__(self, parser: AnswerParser, tag: str, before: str, kind: TextKind) -> None:
        assert parser.tools is not None
        self._parser = parser
        self._kind = kind
        self._block = Block(tag, parser.schemas, parser.events, parser.indices, list(before + tag))
        self._violated = False
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
        except (StopIteration, ViolationError) as end:
            self._violated = isinstance(end, ViolationError)
            return True
        return False

    def _leave(self) -> str:
        parser, block = self._parser, self._block
        rest = "".join(block.raw)
        call = block.call
        if self._violated and call is not None and not (parser.cut_off or call.is_complete):
            parser.malformed = True
            parser.events.append(ToolCallBroken(call.index, block.text_of_call, self._kind is ReasoningDelta))
            parser.mode = _Text(parser, self._kind)
            return rest
        if block.committed:
            parser.malformed |= block.begun and not parser.cut_off
            parser.mode = _Edge(parser, ContentDelta)
            return rest
        parser.malformed |= self._is_no_call()
        parser.mode = text = _Text(parser, self._kind)
        text.say(rest)
        return ""

    def _is_no_call(self) -> bool:
        """Whether the block was to be a call. Text behind an edge tag may look like the beginning of one."""
        assert self._parser.tools is not None
        marked = self._block.tag in self._parser.tools.open_tags
        return marked and self._kind is ContentDelta and not self._parser.cut_off
