"""What a tool format is, and the text of one tool block as the format's grammar reads it.

A grammar is a coroutine over a `Block`: it takes one character after the other, so that it cannot know how
the text was cut into pieces, and a stream and a complete answer are parsed alike by construction.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from lmdeploy_jax.errors import ConfigError
from lmdeploy_jax.text.parsers.events import Event, ToolCallArguments, ToolCallStart
from lmdeploy_jax.text.parsers.json_scan import JsonScanner

T = TypeVar("T")
Reading = Generator[None, str, T]  # is sent characters, "" at the end of the answer
Schemas = Mapping[str, Mapping[str, Any]]  # tool name -> JSON schema of its parameters


class ViolationError(Exception):
    """The text is not what the grammar asks for. The character that offends has been seen, not taken."""


@dataclass
class Block:
    """The text from an open tag on. A grammar peeks and takes; what it commits has been said in events.

    Whatever has not been committed when the grammar returns or gives up goes back into the answer's text, so
    that nothing is lost.
    """

    tag: str
    schemas: Schemas | None
    events: list[Event]
    indices: Iterator[int]
    raw: list[str]  # taken but not committed; begins with the open tag
    committed: bool = False
    call: Call | None = None  # the last one that has been announced
    begun: bool = False  # whether another call has begun behind that one; grammars of several calls say so
    said: list[str] = field(default_factory=list)  # what has been committed since that call's beginning
    pending: str | None = field(default=None, init=False)  # peeked but not taken

    def peek(self) -> Reading[str]:
        if self.pending is None:
            self.pending = yield
        return self.pending

    def take(self) -> Reading[str]:
        char = yield from self.peek()
        if not char:
            raise ViolationError
        self.raw.append(char)
        self.pending = None
        return char

    def take_while(self, predicate: Callable[[str], object]) -> Reading[str]:
        taken: list[str] = []
        while (char := (yield from self.peek())) and predicate(char):
            taken.append((yield from self.take()))
        return "".join(taken)

    def space(self) -> Reading[str]:
        return (yield from self.take_while(str.isspace))

    def word(self, but: str) -> Reading[str]:
        """At least one character, none of them a space or one of `but`."""
        word = yield from self.take_while(lambda char: not char.isspace() and char not in but)
        if not word:
            raise ViolationError
        return word

    def one_of(self, *texts: str) -> Reading[str]:
        """Takes one of the texts, none of which is a prefix of another."""
        seen = ""
        while seen not in texts:
            seen += yield from self.peek()
            if not self.pending or not any(text.startswith(seen) for text in texts):
                raise ViolationError
            yield from self.take()
        return seen

    def json(self, scanner: JsonScanner) -> Reading[str]:
        """Takes the next character of a JSON text."""
        if not scanner.push((yield from self.peek())):
            raise ViolationError
        return (yield from self.take())

    def close(self, tag: str) -> Reading[None]:
        """Takes the block's close tag, with space before it."""
        yield from self.space()
        yield from self.one_of(tag)
        self.commit()

    def commit(self, keep: int = 0) -> None:
        """Everything taken has been said, but for the last `keep` characters."""
        end = len(self.raw) - keep
        self.said += self.raw[:end]
        del self.raw[:end]
        self.committed = True

    @property
    def text_of_call(self) -> str:
        """What the model has written of the last call, as far as it has been committed."""
        return "".join(self.said)


class Call:
    """One call being read. It is announced as soon as its name is whole and its arguments have begun.

    A call of a tool that nobody offered is none: clients do not know what to do with it.
    """

    def __init__(self, block: Block, name: str | None = None) -> None:
        if block.call is not None:  # that call is complete, since the grammar has read on
            block.said.clear()
        self.index = -1  # until it is announced
        self._block = block
        self._sent: list[str] = []
        self._waiting: list[str] = []
        self.name = name
        self.has_arguments = False

    def named(self, name: str) -> None:
        self.name = name
        if self._waiting:
            self._send(0)

    def add(self, arguments: str, keep: int = 0) -> None:
        """Adds to the arguments' text; `keep`: characters of the block taken that this does not express."""
        self.has_arguments = True
        self._waiting.append(arguments)
        if self.name is not None:
            self._send(keep)

    @property
    def is_complete(self) -> bool:
        """Whether the arguments are one JSON value."""
        scanner = JsonScanner()
        return all(map(scanner.push, "".join(self._sent))) and scanner.complete

    def _send(self, keep: int) -> None:
        if self.index < 0:
            assert self.name is not None
            if self._block.schemas is not None and self.name not in self._block.schemas:
                raise ViolationError
            self.index = next(self._block.indices)
            self._block.call, self._block.begun = self, False
            self._block.events.append(ToolCallStart(self.index, self.name))
        if delta := "".join(self._waiting):
            self._block.events.append(ToolCallArguments(self.index, delta))
            self._sent.append(delta)
        self._waiting.clear()
        self._block.commit(keep)


@dataclass(frozen=True)
class ToolFormat:
    """How a model writes tool calls.

    open_tags: each begins a block, anywhere in the answer. No tag is a prefix of another.
    read: the grammar of a block after its open tag. It must take or peek at least once.
    edge_tags: open tags only where no text stands before them since the answer's start or the last block.
    special_tokens: strings that are special tokens in such models' vocabularies and must stay in the text.
    frames: whether tags stand around everything in an answer, so that they are read without tools too.
    """

    open_tags: tuple[str, ...]
    read: Callable[[Block], Reading[None]]
    edge_tags: tuple[str, ...] = ()
    special_tokens: tuple[str, ...] = ()
    frames: bool = False

    def __post_init__(self) -> None:
        if not all((*self.open_tags, *self.edge_tags)):
            raise ConfigError(
                f"open_tags={self.open_tags!r}, edge_tags={self.edge_tags!r}: no tag may be empty."
            )


@dataclass(frozen=True)
class ReasoningFormat:
    """How a model marks its reasoning: between two tags, the first of which the prompt may already hold.

    gap: what a grammar puts between the close tag and an answer that is held to a form.
    """

    open: str = "<think>"
    close: str = "</think>"
    gap: str = "\n\n"

    def __post_init__(self) -> None:
        if not self.open or not self.close:
            raise ConfigError(f"open={self.open!r}, close={self.close!r}: a reasoning tag may not be empty.")

    def opened_by(self, prompt: str) -> bool:
        """Whether the rendered prompt ends with the open tag, so that the answer starts in reasoning."""
        return prompt.rstrip().endswith(self.open)
