"""The engine's nouns: everything a request needs on its way, and what comes back."""

from __future__ import annotations

import enum
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from lmdeploy_jax.cache.manager import PageTable
from lmdeploy_jax.logs import logger
from lmdeploy_jax.messages import FinishReason, LogitsProcessor
from lmdeploy_jax.prompt import EncodedPrompt

if TYPE_CHECKING:
    from lmdeploy_jax.guided.grammars import Grammar
    from lmdeploy_jax.guided.matcher import Matcher
    from lmdeploy_jax.sampling.repetition import NgramStop


class Head(enum.IntEnum):
    """What turns hidden states into tokens; each can stand in for those before it."""

    GREEDY = 0
    SAMPLE = 1
    FULL = 2


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
    routes: bool = False  # the experts of every position
    ngram_size: int = 0
    ngram_threshold: int = 0
    logits_processors: tuple[LogitsProcessor, ...] = ()
    grammar: Grammar | None = None

    def with_grammar(self, grammar: Grammar | None) -> SamplingParams:
        """The same instructions under another grammar."""
        return replace(self, grammar=grammar)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @cached_property
    def reshapes_logits(self) -> bool:
        """True where logits are changed before sampling, by history or by fixed biases."""
        penalties = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (
            1.0,
            0.0,
            0.0,
        )
        masks = self.banned_token_ids or self.logit_bias or (self.min_new_tokens and self.stop_token_ids)
        return bool(penalties or masks)

    @property
    def reports_prompt(self) -> bool:
        """True where every prompt position has to be computed, since something is reported for each."""
        return self.prompt_logprobs is not None or self.routes or "all" in (self.logits, self.hidden)

    @property
    def wants_rows(self) -> bool:
        """Whether something is told of the rows that tokens are drawn from."""
        return bool(self.logits or self.hidden or self.routes)

    @cached_property
    def needs_host(self) -> bool:
        """True where Python must see every token before the next one is sampled."""
        return bool(self.logits_processors or self.banned_sequences)

    @cached_property
    def repeats(self) -> bool:
        """Whether the device can draw several tokens before the host sees the first."""
        return self.head < Head.FULL and self.grammar is None and not self.wants_rows

    @cached_property
    def head(self) -> Head:
        """The cheapest head that can draw the sequence's tokens."""
        if self.reshapes_logits or self.needs_host or self.logprobs is not None:
            return Head.FULL
        return Head.GREEDY if self.greedy else Head.SAMPLE


@dataclass
class TokenLogprobs:
    """The sampled token's log-probability and the most likely tokens', from the raw logits."""

    logprob: float
    top: dict[int, float]


@dataclass(slots=True)
class StepOutput:
    """What one step adds to one sequence. Delivered on the engine's thread."""

    request_id: int
    index: int = 0  # which of the request's n sequences
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] | None = None  # whole prompt, once, with the first token
    logits: Any = None  # f32 [rows, V] numpy
    hidden: Any = None  # f32 [rows, E] numpy
    routes: Any = None  # i32 [rows, L, k] numpy
    finish_reason: FinishReason | None = None
    stop_token: int | None = None  # which stop id ended it (the id is the last of token_ids)
    cached_tokens: int = 0
    queue_seconds: float = 0.0
    error: BaseException | None = None


_ids = itertools.count()


@dataclass(eq=False)
class Request:
    """A prompt with its instructions. `on_output` is called for each StepOutput and must not block.

    streams: somebody reads along, who would notice a pause between two tokens. arrival: on a clock that all
    processes of a machine share, since the engine may run in another one.
    """

    prompt: EncodedPrompt
    params: SamplingParams
    on_output: Callable[[StepOutput], None]
    streams: bool = True
    request_id: int = field(default_factory=lambda: next(_ids))
    arrival: float = field(default_factory=time.perf_counter)
    queue_seconds: float = 0.0  # from arrival to the first step

    def note_admitted(self) -> None:
        """The scheduler has given it a slot, for the first time or again after a preemption."""
        if not self.queue_seconds:
            self.queue_seconds = time.perf_counter() - self.arrival

    def refuse(self, error: BaseException) -> None:
        """Tell that none of its sequences can run."""
        for i in range(self.params.n):
            self.tell(StepOutput(self.request_id, i, finish_reason="error", error=error))

    def tell(self, out: StepOutput) -> None:
        """Call the listener, whose faults must not end the other requests."""
        try:
            self.on_output(out)
        except BaseException:  # a listener's sys.exit() would end the engine's thread
            logger.exception("the listener of request %d failed", self.request_id)


class Status(enum.Enum):
    WAITING = enum.auto()
    RUNNING = enum.auto()
    FORKING = enum.auto()  # holds a slot, waits for its sibling's prefill
    FINISHED = enum.auto()


@dataclass
class PromptReport:
    """What a request wants to know of its prompt's positions, collected chunk by chunk."""

    logprobs: list[Any] = field(default_factory=list)  # packed i32 [n, 2 + 2k], see `reports.pack_logprobs`
    logits: list[Any] = field(default_factory=list)  # f32 [n, V]
    hidden: list[Any] = field(default_factory=list)  # f32 [n, E]
    routes: list[Any] = field(default_factory=list)  # i32 [n, L, k]


@dataclass(eq=False)
class Sequence:
    """One continuation of a request, as the scheduler sees it.

    The host runs ahead of the device: `unread` tokens have been sampled but not read back yet, so the
    sequence is `length` tokens long although only `tokens` are known. `computed` counts the tokens whose keys
    and values are in the cache once every dispatched step has run; a step computes tokens `computed ..
    computed + n`, and samples when that reaches `length`.
    """

    request: Request
    index: int = 0
    tokens: list[int] = field(default_factory=list)  # prompt, then generated
    unread: int = 0
    computed: int = 0
    cached: int = 0  # prompt tokens that came from the prefix cache
    pages: PageTable = field(default_factory=PageTable)
    hashes: list[bytes] = field(default_factory=list)  # prefix hash of each full page registered so far
    state: int | None = None  # the row of states that its slot begins with, until it is copied
    state_ends: tuple[int, ...] = ()  # tokens behind which a step must end, as the state there is kept
    rope_floor: int = 0  # least length that length-dependent RoPE takes the sequence for
    slot: int = -1
    table_version: int = -1  # of `pages`, as far as the slot's row of the host page table has it
    pending: bool = False  # the last token stands in the slot's cell of the device's pending array
    status: Status = Status.WAITING
    siblings: list[Sequence] = field(default_factory=list)  # of the first of n sequences, until they fork
    ngram: NgramStop | None = None
    matcher: Matcher | None = None  # stands behind the last token of `tokens`
    report: PromptReport | None = None  # what is told about the prompt, until the first token is read

    def __post_init__(self) -> None:
        self.params = self.request.params
        self.num_prompt = len(self.request.prompt)
        self.max_length = self.num_prompt + self.params.max_new_tokens

    @property
    def rope_len(self) -> int:
        """Length that length-dependent RoPE is scaled for where a token's own position does not exceed it."""
        return max(self.num_prompt, self.rope_floor)

    @property
    def rope_offset(self) -> int:
        """See `RopePositions.offset`."""
        rope = self.request.prompt.rope
        return 0 if rope is None else rope.offset

    @property
    def length(self) -> int:
        return len(self.tokens) + self.unread

    @property
    def num_generated(self) -> int:
        return self.length - self.num_prompt

    @property
    def remaining(self) -> int:
        """Tokens that the next steps must compute."""
        return self.length - self.computed

    @property
    def finished(self) -> bool:
        return self.status is Status.FINISHED


Draws = list[tuple[Sequence, int]]  # sequences with the row of hidden states that each samples from
