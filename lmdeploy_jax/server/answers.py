"""Answers on their way to a client: parsed pieces that every protocol renders in its own manner."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from lmdeploy_jax.messages import GenerationConfig, Response
from lmdeploy_jax.server.errors import ApiError, own_failure
from lmdeploy_jax.server.generation import Generation
from lmdeploy_jax.text.parsers import (
    AnswerParser,
    ContentDelta,
    Event,
    ParsedAnswer,
    ReasoningFormat,
    ToolCallStart,
    collect,
)
from lmdeploy_jax.text.tokenizer import Tokenizer

Reason = Literal["stop", "length", "tool_calls", "parse_error", "abort", "error"]
TokenLogprobs = dict[int, float]  # token id -> log-probability: the likeliest, and the sampled one


@dataclass(frozen=True, slots=True)
class Finish:
    """How an answer ended. stop_match: the stop string or id that ended it. error: why it is not whole.

    parse_error, LMDeploy's word: the model's tool call cannot be read.
    """

    reason: Reason
    stop_match: str | int | None = None
    error: ApiError | None = None


@dataclass(slots=True)
class Delta:
    """What one answer has gained since the last look.

    choice: which of the request's answers. events: its text, parsed. logprobs: one entry a token of
    `token_ids`, where they were asked for. prompt_logprobs: once, with the first tokens, where asked for.
    """

    choice: int
    events: list[Event]
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    finish: Finish | None = None


@dataclass(slots=True)
class Usage:
    """Tokens of a request, all of its answers together; the prompt counts once."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0


@dataclass
class Answer:
    """One complete answer."""

    choice: int
    parsed: ParsedAnswer
    finish: Finish
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None
    prompt_logprobs: list[TokenLogprobs | None] | None


def user_stop(config: GenerationConfig, match: str | int | None) -> str | int | None:
    """The stop string or id, if it is one that the request has named."""
    named = match in (config.stop_words or ()) or match in (config.stop_token_ids or ())
    return match if named else None


class AnswerReader:
    """Turns one answer's pieces into Deltas.

    one_call: end the answer before a second tool call (`parallel_tool_calls` off).
    """

    def __init__(
        self,
        choice: int,
        config: GenerationConfig,
        parser: AnswerParser | None = None,
        counter: ReasoningCounter | None = None,
        *,
        one_call: bool = False,
    ) -> None:
        self.cut = False  # whether the rest of the answer is not wanted
        self._one_call = one_call
        self._choice = choice
        self._config = config
        self._parser = parser
        self._counter = counter
        self._called = False

    def read(self, piece: Response) -> Delta:
        """The piece as a Delta. Raises `ApiError` for a failure that is not this answer's own."""
        error = own_failure(piece)
        events = self._events(piece)
        if self._counter is not None:
            self._counter.feed(piece.token_ids)
        return Delta(
            self._choice,
            events,
            piece.token_ids,
            piece.logprobs,
            piece.prompt_logprobs,
            self._finish(piece) if error is None else Finish("error", error=error),
        )

    @property
    def reasoning_tokens(self) -> int:
        return self._counter.count if self._counter is not None else 0

    def _events(self, piece: Response) -> list[Event]:
        if self._parser is None:
            return [ContentDelta(piece.text)] if piece.text else []
        events = self._parser.feed(piece.text) if piece.text else []
        if piece.finish_reason is not None:
            events += self._parser.finish(cut_off=piece.finish_reason != "stop")
        return self._kept(events) if events else events

    def _kept(self, events: list[Event]) -> list[Event]:
        for i, event in enumerate(events):
            if isinstance(event, ToolCallStart):
                if self._called and self._one_call:
                    self.cut = True
                    return events[:i]
                self._called = True
        return events

    def _finish(self, piece: Response) -> Finish | None:
        if self.cut:
            return Finish(self._ending())
        reason = piece.finish_reason
        if reason is None or reason == "error":
            return None
        return Finish(
            self._ending() if reason == "stop" else reason, user_stop(self._config, piece.stop_match)
        )

    def _ending(self) -> Reason:
        if self._parser is not None and self._parser.malformed:
            return "parse_error"
        return "tool_calls" if self._called else "stop"


class ReasoningCounter:
    """Counts the tokens between the tags of reasoning, which are tokens of their own in such vocabularies."""

    def __init__(self, tokenizer: Tokenizer, form: ReasoningFormat, started: bool) -> None:
        self.count = 0
        self._open = tokenizer.token_to_id(form.open)
        self._close = tokenizer.token_to_id(form.close)
        self._within = started

    def feed(self, ids: list[int]) -> None:
        for i in ids:
            if i == self._open or i == self._close:
                self._within = i == self._open
            else:
                self.count += self._within


ReaderFactory = Callable[[int], AnswerReader]


class Answers:
    """The answers to one prompt as they come: iterates over lists of Deltas, one an answer.

    `usage` grows with them. Raises `ApiError` where an answer fails. Who stops reading early must `close`.
    """

    def __init__(self, generation: Generation, make_reader: ReaderFactory) -> None:
        self.generation = generation
        self.usage = Usage()
        self._make_reader = make_reader
        self._readers: dict[int, AnswerReader] = {}
        self._lengths: dict[int, int] = {}
        self._ahead: list[Delta] = []

    async def begin(self) -> Answers:
        """Wait for the first Deltas, so that what goes wrong before them can still be told by a status."""
        self._ahead = await anext(self)
        return self

    def __aiter__(self) -> Answers:
        return self

    async def __anext__(self) -> list[Delta]:
        deltas, self._ahead = self._ahead, []
        try:
            while not deltas:
                pieces = await anext(self.generation)
                deltas = [delta for piece in pieces if (delta := self._read(piece)) is not None]
        except BaseException:
            self.close()
            raise
        return deltas

    def _read(self, piece: Response) -> Delta | None:
        reader = self._readers.get(piece.choice)
        if reader is None:
            reader = self._readers[piece.choice] = self._make_reader(piece.choice)
        if reader.cut:  # its last piece has been told already
            return None
        delta = reader.read(piece)
        self._count(piece)
        if reader.cut and piece.finish_reason is None:
            self.generation.abort(piece.choice)
        return delta

    def _count(self, piece: Response) -> None:
        usage, before = self.usage, self._lengths.get(piece.choice, 0)
        usage.prompt_tokens = piece.input_token_len
        usage.cached_tokens = max(usage.cached_tokens, piece.cached_tokens)
        usage.completion_tokens += piece.generate_token_len - before
        self._lengths[piece.choice] = piece.generate_token_len
        if piece.finish_reason is not None:
            usage.reasoning_tokens += self._readers[piece.choice].reasoning_tokens

    def close(self) -> None:
        self.generation.close()

    async def complete(self) -> list[Answer]:
        """All answers as wholes, in order."""
        parts: dict[int, list[Delta]] = {}
        async for deltas in self:
            for delta in deltas:
                parts.setdefault(delta.choice, []).append(delta)
        return [_whole(parts[choice]) for choice in sorted(parts)]


def _whole(deltas: list[Delta]) -> Answer:
    first, last = deltas[0], deltas[-1]
    assert last.finish is not None
    logprobs = None if first.logprobs is None else [entry for d in deltas for entry in d.logprobs or ()]
    return Answer(
        first.choice,
        collect(event for delta in deltas for event in delta.events),
        last.finish,
        [i for delta in deltas for i in delta.token_ids],
        logprobs,
        next((d.prompt_logprobs for d in deltas if d.prompt_logprobs is not None), None),
    )
