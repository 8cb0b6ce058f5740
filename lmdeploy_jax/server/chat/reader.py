"""Turns the pieces of one answer into deltas."""

from __future__ import annotations

from collections.abc import Callable

from lmdeploy_jax.messages import GenerationConfig, Response
from lmdeploy_jax.server.chat.deltas import Delta, Finish, Reason
from lmdeploy_jax.server.errors import own_failure
from lmdeploy_jax.server.generation import named_stop
from lmdeploy_jax.text.parsers import AnswerParser, ContentDelta, Event, ReasoningFormat, ToolCallStart
from lmdeploy_jax.text.tokenizer import Tokenizer


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
        self.truncated = False  # whether the rest of the answer is not wanted
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
        return self._up_to_second_call(events) if events else events

    def _up_to_second_call(self, events: list[Event]) -> list[Event]:
        for i, event in enumerate(events):
            if isinstance(event, ToolCallStart):
                if self._called and self._one_call:
                    self.truncated = True
                    return events[:i]
                self._called = True
        return events

    def _finish(self, piece: Response) -> Finish | None:
        if self.truncated:
            return Finish(self._stop_reason())
        reason = piece.finish_reason
        if reason is None or reason == "error":
            return None
        return Finish(
            self._stop_reason() if reason == "stop" else reason, named_stop(self._config, piece.stop_match)
        )

    def _stop_reason(self) -> Reason:
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
