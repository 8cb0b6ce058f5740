"""Answers in the shape of OpenAI's text completions: chunks of a stream, and whole."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from lmdeploy_jax.messages import Response
from lmdeploy_jax.server.completions.bodies import CompletionRequest
from lmdeploy_jax.server.errors import choice_error, own_failure
from lmdeploy_jax.server.generation import Generation, Job, named_stop
from lmdeploy_jax.server.http.sse import data
from lmdeploy_jax.server.ids import now
from lmdeploy_jax.server.logprobs import TopLogprobs, completion_logprobs
from lmdeploy_jax.server.usage import Usage, openai_usage
from lmdeploy_jax.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class CompletionShape:
    """What of the answers is told. top: None for no log-probabilities. echo: the prompts' texts, or none."""

    id: str
    created: int
    model: str
    tokenizer: Tokenizer
    jobs: Sequence[Job]
    top: int | None = None
    echo: tuple[str, ...] | None = None
    only_prompt: bool = False  # what is generated is left out
    include_usage: bool = False


def completion_shape(
    body: CompletionRequest,
    id: str,
    model: str,
    tokenizer: Tokenizer,
    prompts: Sequence[str | list[int]],
    jobs: Sequence[Job],
) -> CompletionShape:
    """What the request asks to be told of."""
    return CompletionShape(
        id=id,
        created=now(),
        model=model,
        tokenizer=tokenizer,
        jobs=jobs,
        top=body.logprobs,
        echo=_texts(tokenizer, prompts) if body.echo else None,
        only_prompt=body.length == 0,
        include_usage=body.stream_options is not None and body.stream_options.include_usage,
    )


def _texts(tokenizer: Tokenizer, prompts: Sequence[str | list[int]]) -> tuple[str, ...]:
    return tuple(p if isinstance(p, str) else tokenizer.decode(p, skip_special_tokens=False) for p in prompts)


@dataclass
class CompletionWriter:
    """Turns pieces of answers into choices, and counts. One for each request."""

    shape: CompletionShape
    _lengths: dict[tuple[int, int], int] = field(default_factory=dict)  # tokens of each answer so far
    _offsets: dict[tuple[int, int], int] = field(default_factory=dict)  # and characters
    _prompts: dict[int, list[TopLogprobs | None]] = field(default_factory=dict)
    _cached: dict[int, int] = field(default_factory=dict)

    async def chunks(self, generation: Generation) -> AsyncGenerator[bytes, None]:
        """The stream's body: all chunks that come together as one piece of it."""
        async for pieces in generation:
            yield b"".join([data(self._body([self.choice(piece)])) for piece in pieces])
        if self.shape.include_usage:
            yield data(self._body([], self.usage))

    async def whole(self, generation: Generation) -> dict[str, Any]:
        """All answers, in order."""
        with closing(generation):
            choices = [self.choice(piece) async for pieces in generation for piece in pieces]
        choices.sort(key=lambda choice: choice["index"])
        return self._body(choices, self.usage)

    def choice(self, piece: Response) -> dict[str, Any]:
        """One choice. Raises `ApiError` for a failure that is not this answer's own."""
        error = own_failure(piece)
        key = piece.index, piece.choice
        first = key not in self._lengths
        self._lengths[key] = piece.generate_token_len
        self._cached[piece.index] = max(self._cached.get(piece.index, 0), piece.cached_tokens)
        if piece.prompt_logprobs is not None:  # told once for all answers to a prompt
            self._prompts[piece.index] = piece.prompt_logprobs
        config = self.shape.jobs[piece.index].config
        return {
            "index": piece.index * config.n + piece.choice,
            "text": self._text(piece, first),
            "logprobs": self._logprobs(piece, first),
            "finish_reason": "length" if self.shape.only_prompt and not error else piece.finish_reason,
            "stop_reason": named_stop(config, piece.stop_match),
        } | choice_error(error)

    def _text(self, piece: Response, first: bool) -> str:
        echo = self.shape.echo[piece.index] if self.shape.echo is not None and first else ""
        return echo if self.shape.only_prompt else echo + piece.text

    def _logprobs(self, piece: Response, first: bool) -> dict[str, Any] | None:
        shape = self.shape
        if shape.top is None:
            return None
        ids, entries = list(piece.token_ids), list[TopLogprobs | None](piece.logprobs or ())
        if shape.only_prompt:
            ids, entries = [], []
        if first and shape.echo is not None:
            prompt = shape.jobs[piece.index].prompt
            ids = [*prompt.ids, *ids]
            entries = [*self._prompts.get(piece.index, [None] * len(prompt)), *entries]
        key = piece.index, piece.choice
        told, self._offsets[key] = completion_logprobs(
            shape.tokenizer, ids, entries, shape.top, self._offsets.get(key, 0)
        )
        return told

    @property
    def usage(self) -> Usage:
        """Tokens of all answers so far; each prompt counts once."""
        return Usage(
            sum(len(job.prompt) for job in self.shape.jobs),
            0 if self.shape.only_prompt else sum(self._lengths.values()),
            sum(self._cached.values()),
        )

    def _body(self, choices: Sequence[dict[str, Any]], usage: Usage | None = None) -> dict[str, Any]:
        shape = self.shape
        head = {"id": shape.id, "object": "text_completion", "created": shape.created, "model": shape.model}
        return head | {"choices": list(choices)} | ({"usage": openai_usage(usage)} if usage else {})
