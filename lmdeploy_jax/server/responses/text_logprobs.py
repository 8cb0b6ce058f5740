"""Log-probabilities of a message's tokens, found among all of an answer's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lmdeploy_jax.server.chat.deltas import Delta
from lmdeploy_jax.server.logprobs import chat_logprobs
from lmdeploy_jax.text.parsers import ContentDelta, Event, ReasoningDelta
from lmdeploy_jax.text.tokenizer import Tokenizer

Entry = dict[str, Any]


class TextLogprobs:
    """Reads an answer's deltas and tells which tokens its text is made of: those of reasoning, of calls and
    of the tags around them are none of it.

    top: how many alternatives each token is told with; None where nothing is asked for.
    """

    def __init__(self, tokenizer: Tokenizer, top: int | None) -> None:
        self._tokenizer, self._top = tokenizer, top
        self._raw = b""  # what the tokens say that no event has been found in yet
        self._pending: list[tuple[int, Entry]] = []  # (where a token begins in it, the token)

    def read(self, delta: Delta) -> list[list[Entry]]:
        """For each event of the delta the entries of its tokens; none for what is no text."""
        if self._top is None:
            return [[] for _ in delta.events]
        for entry in chat_logprobs(self._tokenizer, delta.token_ids, delta.logprobs or (), self._top):
            self._pending.append((len(self._raw), entry))
            self._raw += bytes(entry["bytes"])
        told, position = [], 0
        for event, limit in zip(delta.events, self._limits(delta.events), strict=True):
            position, entries = self._take(event, position, limit)
            told.append(entries)
        self._raw = self._raw[position:]
        self._pending = [(start - position, entry) for start, entry in self._pending]
        return told

    def _limits(self, events: Sequence[Event]) -> list[int]:
        """Where each event has ended at the latest: what the parser holds back is at the end."""
        limits = [len(self._raw)]
        for event in reversed(events[1:]):
            start = self._raw.rfind(_text(event), 0, limits[-1])
            limits.append(start if start >= 0 else limits[-1])
        return limits[::-1][: len(events)]

    def _take(self, event: Event, position: int, limit: int) -> tuple[int, list[Entry]]:
        """Where the event ends, and its entries. Text goes on where it was, or begins anew behind a tag."""
        text = _text(event)
        if not text:
            return position, []
        start = position if self._raw.startswith(text, position) else self._raw.rfind(text, position, limit)
        end = start + len(text) if start >= 0 else limit  # else it is not what its tokens say one by one
        passed = [(begin, entry) for begin, entry in self._pending if begin < end]
        self._pending = self._pending[len(passed) :]
        if isinstance(event, ReasoningDelta):
            return end, []
        return end, [entry for begin, entry in passed if begin + len(entry["bytes"]) > start]


def _text(event: Event) -> bytes:
    return event.text.encode() if isinstance(event, ContentDelta | ReasoningDelta) else b""
