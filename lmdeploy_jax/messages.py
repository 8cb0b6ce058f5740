"""What goes into a generation and what comes out of it: the public dataclasses."""

from __future__ import annotations

import enum
import time
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from html import escape
from typing import Annotated, Any, Literal

from lmdeploy_jax.checked import NOT_EMPTY, POSITIVE, Checked, Rule, at_least, within
from lmdeploy_jax.config import (  # LMDeploy has them here
    PytorchEngineConfig as PytorchEngineConfig,
)
from lmdeploy_jax.config import QuantPolicy as QuantPolicy
from lmdeploy_jax.config import SpeculativeConfig as SpeculativeConfig
from lmdeploy_jax.config import TurbomindEngineConfig as TurbomindEngineConfig
from lmdeploy_jax.config import VisionConfig as VisionConfig

MAX_LOGPROBS = 20  # most alternatives a token can be reported with
MAX_WORDS, MAX_WORDS_LENGTH = 1024, 8192  # stop words or bad words, and the characters of all of them
FinishReason = Literal["stop", "length", "error", "abort"]
LogitsProcessor = Callable[[list[int], Any], Any]  # (ids so far, logits f32 [V] as numpy) -> logits f32 [V]


# What a form must have, whatever its type; `guided/response_format.py` reads the rest.
_TYPED = Rule("with a 'type' that is a text", lambda form: isinstance(form.get("type"), str))
_Count = Annotated[int, at_least(0)]
_FEW = Rule(
    f"and which holds at most {MAX_WORDS} of them, with at most {MAX_WORDS_LENGTH} characters together",
    lambda words: len(words) <= MAX_WORDS and sum(map(len, words)) <= MAX_WORDS_LENGTH,
)
_Words = Annotated[Sequence[Annotated[str, NOT_EMPTY]], _FEW]
_NO_PPL = Rule("; Pipeline.get_ppl gives perplexities", lambda value: True)
_NO_MIGRATION = Rule(", since prefill and decode run in one engine", lambda value: True)


@dataclass
class GenerationConfig(Checked):
    """How one prompt is continued. Names and defaults are LMDeploy's.

    Greedy unless `do_sample`; `temperature=0` is greedy too. Penalties, stop and bad words and `logit_bias`
    work in both modes. `ignore_eos` disables every stop *id*; stop strings are still honoured.

    Raises `ConfigError` for a value that cannot work, here and where a field is set later.
    """

    n: Annotated[int, at_least(1)] = 1
    max_new_tokens: Annotated[int, at_least(1)] | None = 512  # None: up to the end of the context
    do_sample: bool = False
    top_p: Annotated[float, within(0.0, 1.0)] = 1.0
    top_k: _Count = 50  # 0: off
    min_p: Annotated[float, within(0.0, 1.0)] = 0.0
    temperature: Annotated[float, within(0.0, 2.0)] = 0.8
    repetition_penalty: Annotated[float, POSITIVE] = 1.0
    presence_penalty: Annotated[float, within(-2.0, 2.0)] = 0.0
    frequency_penalty: Annotated[float, within(-2.0, 2.0)] = 0.0
    ignore_eos: bool = False
    random_seed: _Count | None = None
    stop_words: _Words | None = None
    bad_words: _Words | None = None
    stop_token_ids: Sequence[int] | None = None
    bad_token_ids: Sequence[int] | None = None
    min_new_tokens: _Count | None = None
    logit_bias: dict[int, float] | None = None
    skip_special_tokens: bool = True
    # Both are as HF's fast tokenizers have it: text is the tokens' own, and no space is put between any.
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    logprobs: Annotated[int, within(0, MAX_LOGPROBS)] | None = None  # top N alternatives of every token
    prompt_logprobs: Annotated[int, within(0, MAX_LOGPROBS)] | None = None  # the same for the prompt's
    output_logits: Literal["all", "generation"] | None = None
    output_last_hidden_state: Literal["all", "generation"] | None = None
    return_routed_experts: bool = False  # of engines with `enable_return_routed_experts`
    logits_processors: Sequence[LogitsProcessor] | None = None
    repetition_ngram_size: _Count = 0
    repetition_ngram_threshold: _Count = 0
    # A form to hold the answer to: docs/structured_output.md
    response_format: Annotated[dict[str, Any], _TYPED] | None = None
    return_ppl: Annotated[Literal[False], _NO_PPL] = False
    with_cache: Annotated[Literal[False], _NO_MIGRATION] = False
    preserve_cache: Annotated[Literal[False], _NO_MIGRATION] = False
    migration_request: Annotated[None, _NO_MIGRATION] = None

    def convert_stop_bad_words_to_ids(self, tokenizer: Any) -> None:
        """Add to stop and bad token ids the tokens of a `Tokenizer` that are such a word by themselves.

        The engine does without: it finds words of any length in the text.
        """
        for words, name in ((self.stop_words, "stop_token_ids"), (self.bad_words, "bad_token_ids")):
            encoded = [tokenizer.encode(word, add_special_tokens=False) for word in words or ()]
            whole = [ids[0] for ids in encoded if len(ids) == 1]
            setattr(self, name, list(dict.fromkeys([*whole, *(getattr(self, name) or ())])) or None)

    def update_from_hf_gen_cfg(
        self, generation_config: dict[str, Any], tokenizer_eos_token_id: int | None
    ) -> None:
        """Add the end tokens of a generation_config.json, and the tokenizer's, to the stop token ids."""
        ends = generation_config.get("eos_token_id")
        given = [ends] if isinstance(ends, int) else list(ends or ())
        own = [] if tokenizer_eos_token_id is None else [tokenizer_eos_token_id]
        self.stop_token_ids = list(dict.fromkeys([*(self.stop_token_ids or ()), *own, *given])) or None


@dataclass
class Response:
    """A complete answer, or in a stream the piece that is new since the last one.

    In a stream `text`, `token_ids`, `logprobs` and the rows of `logits` and `last_hidden_state` are new,
    the lengths count from the start, and the last piece of each answer carries `finish_reason`. The token
    that stopped the answer is in none of them unless `include_stop_str_in_output`; where a stop string
    ended it, `token_ids` goes up to and including the token that completed the string, although `text` ends
    before it.

    With `n > 1` a complete answer holds answer 0 in its own fields and the others in `choices`; pieces of a
    stream tell their answer by `choice`. `logprobs[i]` maps token ids to log-probabilities for generated
    token i (the sampled one included); `prompt_logprobs[0]` is None, since nothing predicts the first
    token. `logits` is float32 [tokens, vocab], `last_hidden_state` float32 [tokens, hidden].
    `routed_experts` is int32 [tokens, layers, experts a token], of the prompt's tokens and the answer's but
    the last, which nothing follows; layers without experts say -1.
    """

    text: str
    generate_token_len: int
    input_token_len: int
    finish_reason: FinishReason | None = None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, float]] | None = None
    prompt_logprobs: list[dict[int, float] | None] | None = None
    logits: Any = None
    last_hidden_state: Any = None
    routed_experts: Any = None
    index: int = 0  # which prompt of the call
    choice: int = 0  # which of the prompt's `n` answers
    choices: list[Response] = field(default_factory=list)  # answers 1..n-1 when n > 1
    cached_tokens: int = 0
    queue_seconds: float = 0.0  # that the prompt waited for its first step
    stop_match: str | int | None = None  # the stop string or id that ended the answer
    error_code: str | None = None
    error_message: str | None = None

    def extend(self, piece: Response) -> Response:
        """Append the next piece of the same answer, in place."""
        self.text += piece.text
        self.token_ids = self.token_ids + piece.token_ids
        self.logprobs = _joined(self.logprobs, piece.logprobs)
        self.prompt_logprobs = _joined(self.prompt_logprobs, piece.prompt_logprobs)
        self.logits = _stacked(self.logits, piece.logits)
        self.last_hidden_state = _stacked(self.last_hidden_state, piece.last_hidden_state)
        self.routed_experts = _stacked(self.routed_experts, piece.routed_experts)
        self.cached_tokens = max(self.cached_tokens, piece.cached_tokens)
        self.queue_seconds = max(self.queue_seconds, piece.queue_seconds)
        for name in _LATEST:
            setattr(self, name, getattr(piece, name))
        return self

    def __str__(self) -> str:
        """The text, then one `name=value` line a field."""
        shown = (f for f in fields(self) if f.name not in ("text", "choices"))
        lines = [f"{f.name}={_brief(getattr(self, f.name))}" for f in shown]
        return "\n".join([self.text, *lines, *(f"choices[{i}]={c}" for i, c in enumerate(self.choices))])

    def __repr__(self) -> str:
        """The text and the fields that say something, in the order of the class."""
        shown = [f for f in fields(self) if f.name != "choices" and not _is_default(f, getattr(self, f.name))]
        parts = [f"{f.name}={_brief(getattr(self, f.name), repr)}" for f in shown]
        more = [f"choices={self.choices!r}"] if self.choices else []
        return f"Response({', '.join([*parts, *more])})"

    def _repr_markdown_(self) -> str:
        """What a notebook shows: the text, which models write in Markdown, and how it ended."""
        answers = [self, *self.choices]
        if len(answers) == 1:
            return self._shown()
        return "\n\n".join(f"**Answer {i}**\n\n{answer._shown()}" for i, answer in enumerate(answers))

    def _shown(self) -> str:
        ended = [self.finish_reason or "under way", *([self.error_message] if self.error_message else [])]
        lengths = f"{self.input_token_len} + {self.generate_token_len} tokens"
        return f"{self.text}\n\n<sub>{lengths}, {escape(': '.join(ended))}</sub>"


def _is_default(field: Field[Any], value: Any) -> bool:
    """Whether a field is as it was made; one without a default is always worth showing."""
    if field.default_factory is not MISSING:
        return value == field.default_factory()
    return field.default is not MISSING and not hasattr(value, "shape") and value == field.default


def shortened(text: str, most: int = 60) -> str:
    """A text as Python writes it, cut where it is long."""
    return repr(text) if len(text) <= most else f"{text[:most]!r}…"


_LATEST = (
    "generate_token_len",
    "input_token_len",
    "finish_reason",
    "index",
    "choice",
    "stop_match",
    "error_code",
    "error_message",
)


def _joined(head: list[Any] | None, tail: list[Any] | None) -> list[Any] | None:
    return head if tail is None else (head or []) + tail


def _stacked(head: Any, tail: Any) -> Any:
    if head is None or tail is None:
        return head if tail is None else tail
    import numpy as np  # here, because the package's public names are imported without numpy

    return np.concatenate([head, tail])


def _brief(value: Any, written: Callable[[Any], str] = str) -> str:
    shape = getattr(value, "shape", None)
    return written(value) if shape is None else f"{value.dtype}{list(shape)}"


# What LMDeploy's engines tell its own server. Programs name these types in annotations and comparisons; the
# engine here speaks to nobody but the classes above.

ResponseType = enum.Enum(
    "ResponseType",
    "SUCCESS FINISH ENGINE_STOP_ERROR SESSION_REPEAT SESSION_NOT_EXIST HANDLER_NOT_EXIST INPUT_LENGTH_ERROR "
    "INTERNAL_ENGINE_ERROR CANCEL PREFIX_CACHE_CONFLICT NO_QUEUE NOT_SUPPORTED OUT_OF_MEMORY",
)
EventType = enum.IntEnum("EventType", "QUEUED SCHEDULED PREEMPTED")


@dataclass
class EngineEvent:
    """What became of a request, and when, in seconds."""

    type: EventType
    timestamp: float

    @classmethod
    def new_event(cls, event_type: EventType, timestamp: float | None = None) -> EngineEvent:
        """An event of now, unless its time is given."""
        return cls(event_type, time.time() if timestamp is None else timestamp)


@dataclass
class RequestMetrics:
    """When a step's token came, in seconds, and what had become of the request by then."""

    token_timestamp: float = 0.0
    engine_events: list[EngineEvent] = field(default_factory=list)
    spec_info: dict[str, Any] | None = None
    cached_tokens: int = 0


@dataclass
class ScheduleMetrics:
    """How busy an engine is."""

    active_seqs: int = 0
    waiting_seqs: int = 0
    cache_usage: float = 0.0
    prefix_cache_hit_rate: float = 0.0
    scheduler_tick: int = 0


@dataclass
class EngineOutput:
    """What a step gives of a sequence."""

    status: ResponseType
    token_ids: list[int]
    logprobs: list[dict[int, float]] | None = None
    logits: Any = None
    last_hidden_state: Any = None
    cache_block_ids: list[int] | None = None
    req_metrics: RequestMetrics | None = None
    routed_experts: Any = None
    ce_loss: float | None = None
