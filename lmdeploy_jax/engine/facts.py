"""What is known of an engine in whichever process it is asked: what it is, how it fares, what it can take."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING

from lmdeploy_jax.config import JaxEngineConfig
from lmdeploy_jax.errors import ContextLengthError, RequestError
from lmdeploy_jax.sampling.repetition import NgramStop

if TYPE_CHECKING:
    from lmdeploy_jax.cache.layout import CacheLayout
    from lmdeploy_jax.engine.request import Request, SamplingParams
    from lmdeploy_jax.models.config import DecoderConfig


@dataclass(frozen=True)
class Startup:
    """What starting an engine took: wall seconds to load and to compile, and how much was loaded."""

    backend: str
    weight_bytes: int
    load_seconds: float
    compile_seconds: float


@dataclass(frozen=True)
class EngineFacts:
    """What stays as it is once an engine has started.

    num_pages: of the KV cache, for sequences; cache_layout: what they are pages of. on_cpu: it computes on
    the cores that its users need too.
    """

    folder: Path
    config: JaxEngineConfig
    model_config: DecoderConfig
    session_len: int
    max_batch_size: int
    num_pages: int
    cache_layout: CacheLayout
    startup: Startup
    on_cpu: bool = False

    @property
    def vocab_size(self) -> int:
        return self.model_config.vocab_size


@dataclass(frozen=True)
class EngineStats:
    """How an engine fares at one moment. Compilations count from the engine's start on."""

    running: int = 0  # sequences that hold a slot
    waiting: int = 0  # requests in the queue
    pages_used: int = 0
    preemptions: int = 0
    encoder_cache_queries: int = 0  # images that prompts had to read
    encoder_cache_hits: int = 0  # those whose rows the device held; the others were encoded
    compilations: int = 0
    compile_seconds: float = 0.0


def check_request(request: Request, facts: EngineFacts) -> None:
    """Raises RequestError for a request that an engine with these facts can never serve."""
    prompt, params = request.prompt, request.params
    if facts.model_config.judges_only and not _asks_for_scores(params):
        raise RequestError(
            "This model gives scores and no text: use /v1/score, /v1/rerank, /v1/classify or /pooling, in "
            "Python get_reward_score."
        )
    check_prompt(prompt.ids, facts.session_len, facts.vocab_size)
    for name, ids in _token_ids(params):
        check_ids(name, ids, facts.vocab_size)
    NgramStop(params.ngram_size, params.ngram_threshold)  # raises for what it cannot do
    layout = facts.cache_layout
    spare = facts.num_pages - layout.pages_of(len(prompt))  # each sequence but the first needs a last page
    most = min(facts.max_batch_size, spare // len(layout.groups) + 1)
    if params.n > most:
        raise RequestError(f"n={params.n} sequences cannot run at once: at most {most} can for this prompt.")


def _asks_for_scores(params: SamplingParams) -> bool:
    """Or for hidden states: a model without an output head has nothing else to tell."""
    told = params.logprobs is None and params.prompt_logprobs is None
    return params.max_new_tokens == 1 and told and bool(params.logits or params.hidden)


def _token_ids(params: SamplingParams) -> Iterator[tuple[str, Iterable[int]]]:
    """Every list of token ids that a request carries besides its prompt, and what to call it."""
    yield "stop_token_ids", params.stop_token_ids
    yield "bad_token_ids", params.banned_token_ids
    yield "bad_words", chain.from_iterable(params.banned_sequences)
    yield "logit_bias", (token for token, _ in params.logit_bias)


def check_prompt(prompt: Sequence[int], session_len: int, vocab_size: int) -> None:
    """Raises RequestError for a prompt without tokens or with unknown ones, ContextLengthError for one that
    leaves no room for an answer.
    """
    if not prompt:
        raise RequestError("The prompt has no tokens: give at least one.")
    if len(prompt) >= session_len:
        raise ContextLengthError.of(f"{len(prompt)} tokens", session_len)
    if min(prompt) < 0 or max(prompt) >= vocab_size:
        check_ids("The prompt", prompt, vocab_size)


def check_ids(name: str, ids: Iterable[int], vocab_size: int) -> None:
    """Raises RequestError for the first that is no token id."""
    for i in ids:
        if not isinstance(i, Integral) or not 0 <= i < vocab_size:
            raise RequestError(
                f"{name} holds token id {i!r}, which is outside the vocabulary of {vocab_size} ids."
            )


def within(ids: Iterable[int], vocab_size: int) -> list[int]:
    """Those of `ids` that the model can draw. A tokenizer may know more, which then can be left alone."""
    return [i for i in ids if 0 <= i < vocab_size]
