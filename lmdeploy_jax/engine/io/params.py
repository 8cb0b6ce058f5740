"""GenerationConfig -> SamplingParams: text becomes token ids, and every default is resolved."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING

from lmdeploy_jax.engine.facts import check_ids, check_prompt, within
from lmdeploy_jax.engine.request import SamplingParams
from lmdeploy_jax.errors import RequestError
from lmdeploy_jax.messages import GenerationConfig

if TYPE_CHECKING:
    from lmdeploy_jax.guided.grammars import Grammar

LEAST_TEMPERATURE = 1e-5  # below it the best token is the only one, and logits / temperature may overflow
Encode = Callable[[str], list[int]]  # without the special tokens that begin or end a text


@dataclass(frozen=True)
class ModelLimits:
    """What a model's files say about every generation.

    is_special: tokens left out of the text, so that a stop word which is one of them must stop by its id.
    """

    session_len: int
    vocab_size: int
    encode: Encode
    eos_ids: frozenset[int] = frozenset()
    template_stops: tuple[str, ...] = ()
    is_special: Callable[[int], bool] = lambda token: False
    reports_routes: bool = False


@dataclass(frozen=True)
class Stops:
    """What ends a generation: ids in the engine, strings on the text. `words`: the word of such an id."""

    ids: frozenset[int]
    strings: tuple[str, ...]
    words: dict[int, str]


def sampling_params(
    config: GenerationConfig,
    prompt: Sequence[int],
    limits: ModelLimits,
    stop_ids: frozenset[int],
    grammar: Grammar | None = None,
) -> SamplingParams:
    """The engine's instructions for one prompt. `stop_ids` are those of `stops`, `grammar` what
    `config.response_format` asks for.

    Greedy unless `do_sample` with a temperature that matters; a missing seed is drawn, seeds are taken
    modulo 2**32. `max_new_tokens` is cut to the rest of the context. Raises `ContextLengthError` where
    nothing is left of it, `RequestError` for an empty prompt, ids outside the vocabulary and contradictory
    lengths.
    """
    check_prompt(prompt, limits.session_len, limits.vocab_size)
    room = limits.session_len - len(prompt)
    greedy = not config.do_sample or config.temperature < LEAST_TEMPERATURE or config.top_k == 1
    ngrams = config.repetition_ngram_size > 0 and config.repetition_ngram_threshold > 0
    banned_ids, banned_sequences = _banned(config, limits)
    return SamplingParams(
        max_new_tokens=room if config.max_new_tokens is None else min(config.max_new_tokens, room),
        min_new_tokens=_min_new_tokens(config, room),
        n=config.n,
        temperature=0.0 if greedy else config.temperature,
        top_k=0 if greedy else config.top_k,
        top_p=1.0 if greedy else config.top_p,
        min_p=0.0 if greedy else config.min_p,
        seed=0 if greedy else _seed(config),
        repetition_penalty=config.repetition_penalty,
        presence_penalty=config.presence_penalty,
        frequency_penalty=config.frequency_penalty,
        stop_token_ids=stop_ids,
        banned_token_ids=banned_ids,
        banned_sequences=banned_sequences,
        logit_bias=_logit_bias(config, limits),
        logprobs=config.logprobs,
        prompt_logprobs=config.prompt_logprobs,
        logits=config.output_logits,
        hidden=config.output_last_hidden_state,
        routes=_routes(config, limits),
        ngram_size=config.repetition_ngram_size if ngrams else 0,
        ngram_threshold=config.repetition_ngram_threshold if ngrams else 0,
        logits_processors=tuple(config.logits_processors or ()),
        grammar=grammar,
    )


def _routes(config: GenerationConfig, limits: ModelLimits) -> bool:
    if config.return_routed_experts and not limits.reports_routes:
        raise RequestError(
            "return_routed_experts=True: the engine does not report them; start it with "
            "enable_return_routed_experts=True (--enable-return-routed-experts)."
        )
    return config.return_routed_experts


def stops(config: GenerationConfig, limits: ModelLimits) -> Stops:
    """Which ids and strings end the generation. Under `ignore_eos` only `stop_words` are left."""
    ids, words, strings = set(), {}, []
    for word in dict.fromkeys(config.stop_words or ()):
        special = _only_id(word, limits)
        if special is not None and limits.is_special(special):
            ids.add(special)
            words[special] = word
        else:
            strings.append(word)
    if not config.ignore_eos:
        asked = config.stop_token_ids or ()
        check_ids("stop_token_ids", asked, limits.vocab_size)
        for word in limits.template_stops:
            token = _only_id(word, limits)
            strings.extend([word] if token is None and word not in strings else [])
            ids.update([] if token is None else [token])
        ids.update(asked, limits.eos_ids)
    return Stops(frozenset(within(ids, limits.vocab_size)), tuple(strings), words)


def _only_id(word: str, limits: ModelLimits) -> int | None:
    ids = limits.encode(word)
    return ids[0] if len(ids) == 1 else None


def _min_new_tokens(config: GenerationConfig, room: int) -> int:
    least, most = config.min_new_tokens or 0, config.max_new_tokens
    if most is not None and least > most:
        raise RequestError(f"min_new_tokens={least} is above max_new_tokens={most}.")
    return min(least, room)


def _seed(config: GenerationConfig) -> int:
    return random.getrandbits(32) if config.random_seed is None else config.random_seed & 0xFFFFFFFF


def _banned(
    config: GenerationConfig, limits: ModelLimits
) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """Single banned ids, and banned sequences. A word is banned with and without a space before it, unless
    the model cannot say it anyway.
    """
    check_ids("bad_token_ids", config.bad_token_ids or (), limits.vocab_size)
    spelled = (limits.encode(form) for word in config.bad_words or () for form in (word, f" {word}"))
    forms = {tuple(ids) for ids in spelled if len(within(ids, limits.vocab_size)) == len(ids)}
    singles = {form[0] for form in forms if len(form) == 1} | set(config.bad_token_ids or ())
    longer = (form for form in forms if len(form) > 1 and singles.isdisjoint(form))
    return tuple(sorted(singles)), tuple(sorted(longer))


def _logit_bias(config: GenerationConfig, limits: ModelLimits) -> tuple[tuple[int, float], ...]:
    bias = config.logit_bias or {}
    check_ids("logit_bias", bias, limits.vocab_size)
    for token, value in bias.items():
        if not isinstance(value, Real) or not math.isfinite(value):
            raise RequestError(f"logit_bias[{token}]={value!r} is invalid: it must be a finite number.")
    return tuple(sorted((token, float(value)) for token, value in bias.items()))
