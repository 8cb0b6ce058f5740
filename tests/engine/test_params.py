"""GenerationConfig -> SamplingParams and stops."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from lmdeploy_jax.engine.io.params import ModelLimits, sampling_params, stops
from lmdeploy_jax.engine.request import SamplingParams
from lmdeploy_jax.errors import ContextLengthError, RequestError
from lmdeploy_jax.messages import GenerationConfig

WORDS = {
    "<image>": [25],
    " <image>": [10, 25],
    "<end>": [9],
    "one": [1],
    " one": [11],
    "two": [2, 3],
    " two": [12, 3],
    "bare": [4],
    " bare": [4],
}
LIMITS = ModelLimits(
    session_len=32,
    vocab_size=20,
    encode=WORDS.__getitem__,
    eos_ids=frozenset({8, 99}),
    template_stops=("<end>", "two"),
    is_special=lambda token: token >= 8,
)
PROMPT = [5, 6, 7]


def params(prompt: list[int] = PROMPT, **fields: object) -> SamplingParams:
    config = GenerationConfig(**fields)  # type: ignore[arg-type]
    return sampling_params(config, prompt, LIMITS, stops(config, LIMITS).ids)


@pytest.mark.parametrize(
    "fields", [{"do_sample": False}, {"temperature": 0.0}, {"temperature": 1e-38}, {"top_k": 1}]
)
def test_greedy_leaves_sampling_out(fields):
    got = params(**({"do_sample": True, "top_p": 0.3, "min_p": 0.1, "random_seed": 4} | fields))
    assert got.greedy
    assert (got.top_k, got.top_p, got.min_p, got.seed) == (0, 1.0, 0.0, 0)


def test_sampling_fields_carry_over():
    got = params(do_sample=True, temperature=0.7, top_k=5, top_p=0.9, min_p=0.1, random_seed=2**32 + 3, n=2)
    assert (got.temperature, got.top_k, got.top_p, got.min_p, got.seed, got.n) == (0.7, 5, 0.9, 0.1, 3, 2)


def test_a_missing_seed_is_drawn_anew():
    assert len({params(do_sample=True).seed for _ in range(4)}) > 1


def test_penalties_and_reports_work_in_greedy_too():
    got = params(
        repetition_penalty=1.2,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        logprobs=3,
        prompt_logprobs=0,
        output_logits="all",
        output_last_hidden_state="generation",
    )
    assert (got.repetition_penalty, got.presence_penalty, got.frequency_penalty) == (1.2, 0.5, -0.5)
    assert (got.logprobs, got.prompt_logprobs, got.logits, got.hidden) == (3, 0, "all", "generation")


@pytest.mark.parametrize(("asked", "given"), [(None, 29), (512, 29), (10, 10)])
def test_new_tokens_end_with_the_context(asked, given):
    assert params(max_new_tokens=asked).max_new_tokens == given


def test_min_new_tokens_is_cut_with_the_context_but_not_above_max():
    assert params(min_new_tokens=40).min_new_tokens == 29
    with pytest.raises(RequestError, match="min_new_tokens=5 is above max_new_tokens=4"):
        params(min_new_tokens=5, max_new_tokens=4)


def test_a_prompt_must_leave_room():
    assert params([1] * 31).max_new_tokens == 1
    with pytest.raises(ContextLengthError, match=r"length is 32 tokens\. .* 32 tokens,"):
        params([1] * 32)
    with pytest.raises(RequestError, match="no tokens"):
        params([])


@pytest.mark.parametrize(
    ("prompt", "fields", "name"),
    [
        ([1, 20], {}, "prompt"),
        ([-1], {}, "prompt"),
        (PROMPT, {"stop_token_ids": [20]}, "stop_token_ids"),
        (PROMPT, {"bad_token_ids": [21]}, "bad_token_ids"),
        (PROMPT, {"logit_bias": {22: 1.0}}, "logit_bias"),
        (PROMPT, {"logit_bias": {1: float("inf")}}, "logit_bias"),
    ],
)
def test_ids_outside_the_vocabulary_are_refused(prompt, fields, name):
    with pytest.raises(RequestError, match=name):
        params(prompt, **fields)


def test_stop_ids_are_the_callers_the_models_and_the_templates():
    got = stops(GenerationConfig(stop_token_ids=[15], stop_words=["one"]), LIMITS)
    assert got.ids == {15, 8, 9}  # 99 is outside the vocabulary
    assert got.strings == ("one", "two")
    assert got.words == {}


def test_a_special_token_as_stop_word_stops_by_id_and_keeps_its_name():
    got = stops(GenerationConfig(stop_words=["<end>"], ignore_eos=True), LIMITS)
    assert (got.ids, got.strings, got.words) == ({9}, (), {9: "<end>"})


def test_ignore_eos_leaves_only_stop_words():
    got = stops(GenerationConfig(stop_token_ids=[15], stop_words=["one"], ignore_eos=True), LIMITS)
    assert (got.ids, got.strings) == (frozenset(), ("one",))


def test_bad_words_are_banned_with_and_without_a_space():
    got = params(bad_words=["one", "two", "bare"], bad_token_ids=[16])
    assert got.banned_token_ids == (1, 4, 11, 16)
    assert got.banned_sequences == ((2, 3), (12, 3))


def test_what_the_model_cannot_say_is_neither_banned_nor_a_stop():
    """A tokenizer may know tokens that the model has no logits for, such as placeholders of images."""
    got = params(bad_words=["<image>", "one"], stop_words=["<image>"])
    assert got.banned_token_ids == (1, 11)
    assert got.banned_sequences == ()
    limits = replace(LIMITS, template_stops=("<image>",))
    assert stops(GenerationConfig(stop_words=["<image>"]), limits).ids == {8}


def test_a_sequence_with_a_banned_token_needs_no_ban_of_its_own():
    assert params(bad_words=["two"], bad_token_ids=[3]).banned_sequences == ()


def test_numbers_of_numpy_are_numbers():
    got = params(logit_bias={np.int64(3): np.float32(1.5)}, stop_token_ids=[np.int32(15)])
    assert got.logit_bias == ((3, 1.5),)


@pytest.mark.parametrize(("size", "threshold", "given"), [(4, 3, (4, 3)), (4, 0, (0, 0)), (0, 3, (0, 0))])
def test_ngram_stop_needs_both_numbers(size, threshold, given):
    got = params(repetition_ngram_size=size, repetition_ngram_threshold=threshold)
    assert (got.ngram_size, got.ngram_threshold) == given
