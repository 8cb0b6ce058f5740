"""What goes into a generation and what comes out of it: the public dataclasses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from lmdeploy_jax.errors import ConfigError

MAX_LOGPROBS = 20  # most alternatives a token can be reported with
FinishReason = Literal["stop", "length", "error", "abort"]
LogitsProcessor = Callable[[list[int], Any], Any]  # (ids so far, logits f32 [V] as numpy) -> logits f32 [V]


def _require(ok: bool, name: str, value: object, rule: str) -> None:
    if not ok:
        raise ConfigError(f"GenerationConfig.{name}={value!r} is invalid: it must be {rule}.")


@dataclass
class GenerationConfig:
    """How one prompt is continued. Names and defaults are LMDeploy's.

    Greedy unless `do_sample`; `temperature=0` is greedy too. Penalties, stop and bad words and `logit_bias`
    work in both modes. `ignore_eos` disables every stop *id*; stop strings are still honoured. Raises
    `ConfigError`.
    """

    n: int = 1
    max_new_tokens: int | None = 512  # None: up to the end of the context
    do_sample: bool = False
    top_p: float = 1.0
    top_k: int = 50  # 0: off
    min_p: float = 0.0
    temperature: float = 0.8
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    ignore_eos: bool = False
    random_seed: int | None = None
    stop_words: Sequence[str] | None = None
    bad_words: Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    bad_token_ids: Sequence[int] | None = None
    min_new_tokens: int | None = None
    logit_bias: dict[int, float] | None = None
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    logprobs: int | None = None  # top N alternatives of every generated token
    prompt_logprobs: int | None = None  # the same for the prompt's tokens
    output_logits: Literal["all", "generation"] | None = None
    output_last_hidden_state: Literal["all", "generation"] | None = None
    logits_processors: Sequence[LogitsProcessor] | None = None
    repetition_ngram_size: int = 0
    repetition_ngram_threshold: int = 0
    response_format: dict[str, Any] | None = None  # a form to hold the answer to: docs/structured_output.md

    def __post_init__(self) -> None:
        self._check_counts()
        self._check_ranges()
        self._check_lists()

    def _check_counts(self) -> None:
        for name, least in (
            ("n", 1),
            ("top_k", 0),
            ("repetition_ngram_size", 0),
            ("repetition_ngram_threshold", 0),
        ):
            value = getattr(self, name)
            _require(_is_int(value) and value >= least, name, value, f"an integer >= {least}")
        for name, least in (("max_new_tokens", 1), ("min_new_tokens", 0), ("random_seed", 0)):
            value = getattr(self, name)
            _require(
                value is None or (_is_int(value) and value >= least),
                name,
                value,
                f"None or an integer >= {least}",
            )
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            ok = value is None or (_is_int(value) and 0 <= value <= MAX_LOGPROBS)
            _require(ok, name, value, f"None or an integer in [0, {MAX_LOGPROBS}]")

    def _check_ranges(self) -> None:
        bounds = {
            "top_p": (0.0, 1.0),
            "min_p": (0.0, 1.0),
            "temperature": (0.0, 2.0),
            "presence_penalty": (-2.0, 2.0),
            "frequency_penalty": (-2.0, 2.0),
        }
        for name, (low, high) in bounds.items():
            value = getattr(self, name)
            _require(_is_number(value) and low <= value <= high, name, value, f"a number in [{low}, {high}]")
        penalty = self.repetition_penalty
        _require(
            _is_number(penalty) and 0 < penalty < float("inf"), "repetition_penalty", penalty, "a number > 0"
        )

    def _check_lists(self) -> None:
        for name, kind in (
            ("stop_words", str),
            ("bad_words", str),
            ("stop_token_ids", int),
            ("bad_token_ids", int),
        ):
            value = getattr(self, name)
            ok = value is None or (
                not isinstance(value, str | bytes) and all(isinstance(v, kind) for v in value)
            )
            _require(ok, name, value, f"None or a list of {kind.__name__}")
            _require(kind is int or not value or all(value), name, value, "free of empty strings")
        for name in ("output_logits", "output_last_hidden_state"):
            value = getattr(self, name)
            _require(value in (None, "all", "generation"), name, value, "None, 'all' or 'generation'")
        form = self.response_format
        ok = form is None or (isinstance(form, dict) and isinstance(form.get("type"), str))
        _require(ok, "response_format", form, "None or a dict with a 'type'")
        processors = self.logits_processors or ()
        _require(all(callable(p) for p in processors), "logits_processors", processors, "a list of callables")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


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


def _brief(value: Any) -> str:
    shape = getattr(value, "shape", None)
    return str(value) if shape is None else f"{value.dtype}{list(shape)}"
