"""What a parsed answer consists of, piece by piece and as a whole."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    text: str


@dataclass(frozen=True, slots=True)
class ContentDelta:
    text: str


@dataclass(frozen=True, slots=True)
class ToolCallStart:
    """A call begins. At least one `ToolCallArguments` of the same index follows."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class ToolCallArguments:
    """The next piece of a call's arguments: joined they are JSON text, or its beginning if it was cut off."""

    index: int
    delta: str


@dataclass(frozen=True, slots=True)
class ToolCallBroken:
    """A call that has been announced is none: its arguments are no JSON, and nothing of it follows.

    text: what the model wrote of it. It is content, or where the block stood amid reasoning part of that.
    """

    index: int
    text: str
    in_reasoning: bool = False


Event = ReasoningDelta | ContentDelta | ToolCallStart | ToolCallArguments | ToolCallBroken


@dataclass(frozen=True, slots=True)
class ToolCall:
    name: str
    arguments: str  # JSON text of an object


@dataclass(frozen=True, slots=True)
class ParsedAnswer:
    content: str
    reasoning: str
    tool_calls: list[ToolCall]


def merge(events: Iterable[Event]) -> list[Event]:
    """The same events with neighbouring pieces of one thing joined."""
    groups = groupby(events, lambda event: (type(event), getattr(event, "index", None)))
    return [_join(list(group)) for _, group in groups]


def _join(pieces: list[Event]) -> Event:
    match pieces[0]:
        case ToolCallStart() | ToolCallBroken():
            return pieces[0]
        case ToolCallArguments(index):
            return ToolCallArguments(
                index, "".join(p.delta for p in pieces if isinstance(p, ToolCallArguments))
            )
        case kind:
            return type(kind)("".join(p.text for p in pieces if isinstance(p, type(kind))))


def collect(events: Iterable[Event]) -> ParsedAnswer:
    """The complete answer that a stream of events amounts to. Calls that were taken back are text in it."""
    content: list[str] = []
    reasoning: list[str] = []
    names: dict[int, str] = {}
    arguments: dict[int, list[str]] = {}
    for event in events:
        match event:
            case ContentDelta(text):
                content.append(text)
            case ReasoningDelta(text):
                reasoning.append(text)
            case ToolCallStart(index, name):
                names[index], arguments[index] = name, []
            case ToolCallArguments(index, delta):
                arguments[index].append(delta)
            case ToolCallBroken(index, text, in_reasoning):
                (reasoning if in_reasoning else content).append(text)
                del names[index]
    calls = [ToolCall(names[i], "".join(arguments[i])) for i in names]
    return ParsedAnswer("".join(content), "".join(reasoning), calls)
