"""The engine's nouns: everything a request needs on its way, and what comes back."""

from __future__ import annotations

import enum
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from lmdeploy_jax.messages import FinishReason, LogitsProcessor


@dataclass(frozen=True)
class SamplingParams:
    """Token-level instructions, with every default resolved (no text, no tokenizer from here on)."""

    max_new_tokens: int
    min_new_tokens: int = 0
    n: int = 1
    temperature: float = 0.0  # 0: greedy
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop_token_ids: frozenset[int] = frozenset()  # empty under ignore_eos
    banned_token_ids: tuple[int, ...] = ()
    banned_sequences: tuple[tuple[int, ...], ...] = ()  # bad words of two tokens and more
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logits: str | None = None  # None, "all", "generation"
    hidden: str | None = None
    ngram_size: int = 0
    ngram_threshold: int = 0
    logits_processors: tuple[LogitsProcessor, ...] = ()

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def reshapes_logits(self) -> bool:
        """True where logits are changed before sampling, by history or by fixed biases."""
        penalties = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)
        masks = self.banned_token_ids or self.logit_bias or (self.min_new_tokens and self.stop_token_ids)
        return bool(penalties or masks)

    @property
    def needs_host(self) -> bool:
        """True where Python must see every token before the next one is sampled."""
        return bool(self.logits_processors or self.banned_sequences)


@dataclass
class TokenLogprobs:
    """The sampled token's log-probability and the most likely tokens', from the raw logits."""

    logprob: float
    top: dict[int, float]


@dataclass
class StepOutput:
    """What one step adds to one sequence. Delivered on the engine's thread."""

    request_id: int
    index: int = 0  # which of the request's n sequences
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] | None = None  # whole prompt, once, with the first token
    logits: Any = None  # f32 [rows, V] numpy
    hidden: Any = None  # f32 [rows, E] numpy
    finish_reason: FinishReason | None = None
    stop_token: int | None = None  # which stop id ended it (the id is the last of token_ids)
    cached_tokens: int = 0
    error: BaseException | None = None


_ids = itertools.count()


@dataclass(eq=False)
class Request:
    """A prompt with its instructions. `on_output` is called for each StepOutput and must not block."""

    prompt: Sequence[int]
    params: SamplingParams
    on_output: Callable[[StepOutput], None]
    request_id: int = field(default_factory=lambda: next(_ids))
    arrival: float = field(default_factory=time.perf_counter)


class Status(enum.Enum):
    WAITING = enum.auto()
    RUNNING = enum.auto()
    FINISHED = enum.auto()
