"""The answers to one chat call on their way to a client, which every protocol renders in its own manner."""

from __future__ import annotations

from collections.abc import Callable

from lmdeploy_jax.messages import Response
from lmdeploy_jax.server.chat.deltas import Answer, Delta
from lmdeploy_jax.server.chat.reader import AnswerReader, ReaderFactory
from lmdeploy_jax.server.generation import Generation
from lmdeploy_jax.server.usage import Usage
from lmdeploy_jax.text.parsers import collect


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

    def __aiter__(self) -> Answers:
        return self

    async def __anext__(self) -> list[Delta]:
        deltas: list[Delta] = []
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
        if reader.truncated:  # its last piece has been told already
            return None
        delta = reader.read(piece)
        self._count(piece)
        if reader.truncated and piece.finish_reason is None:
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

    async def complete(self, watch: Callable[[Delta], object] | None = None) -> list[Answer]:
        """All answers as wholes, in order. watch: is shown each delta."""
        parts: dict[int, list[Delta]] = {}
        async for deltas in self:
            for delta in deltas:
                if watch is not None:
                    watch(delta)
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
    )
