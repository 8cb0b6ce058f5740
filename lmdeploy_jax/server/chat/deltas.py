"""What an answer gains while it comes, and what it is when it has ended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lmdeploy_jax.server.errors import ApiError
from lmdeploy_jax.server.logprobs import TopLogprobs
from lmdeploy_jax.text.parsers import Event, ParsedAnswer

Reason = Literal["stop", "length", "tool_calls", "parse_error", "abort", "error"]


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
    `token_ids`, where they were asked for.
    """

    choice: int
    events: list[Event]
    token_ids: list[int]
    logprobs: list[TopLogprobs] | None = None
    finish: Finish | None = None


@dataclass
class Answer:
    """One complete answer."""

    choice: int
    parsed: ParsedAnswer
    finish: Finish
    token_ids: list[int]
    logprobs: list[TopLogprobs] | None
