"""GenerationConfig's checks; Response's joining and printing."""

from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pytest

from lmdeploy_jax.errors import ConfigError
from lmdeploy_jax.messages import GenerationConfig, Response


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 0),
        ("n", True),
        ("max_new_tokens", 0),
        ("top_p", 1.5),
        ("top_k", -1),
        ("min_p", -0.1),
        ("temperature", 2.1),
        ("temperature", float("nan")),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", float("inf")),
        ("presence_penalty", "1"),
        ("frequency_penalty", -3),
        ("stop_words", "one text"),
        ("stop_words", [""]),
        ("bad_words", [1]),
        ("stop_words", ["a"] * 1025),
        ("stop_words", ["a" * 8193]),
        ("bad_words", [str(i) for i in range(1025)]),
        ("bad_words", ["a" * 5000, "b" * 5000]),
        ("stop_token_ids", ["1"]),
        ("min_new_tokens", -1),
        ("logprobs", 21),
        ("prompt_logprobs", -1),
        ("output_logits", "some"),
        ("random_seed", -1),
        ("logits_processors", [3]),
        ("do_sample", "no"),
        ("ignore_eos", "no"),
        ("skip_special_tokens", 0),
        ("include_stop_str_in_output", None),
        ("stop_token_ids", [True]),
        ("stop_token_ids", np.arange(3)),
        ("stop_words", {"a": 1}),
        ("logit_bias", [1]),
        ("logit_bias", {"5": 1.0}),
        ("logit_bias", {5: "1"}),
        ("response_format", {}),
        ("response_format", {"type": 3}),
        ("response_format", "json"),
    ],
)
def test_a_wrong_value_is_named(name, value):
    with pytest.raises(ConfigError, match=f"GenerationConfig.{name}="):
        GenerationConfig(**{name: value})
    config = GenerationConfig()
    with pytest.raises(ConfigError, match=f"GenerationConfig.{name}="):
        setattr(config, name, value)
    assert config == GenerationConfig()


def test_what_fits_is_taken_in_every_spelling():
    config = GenerationConfig(stop_words=("a", "b"), bad_words={"c"}, temperature=1, logit_bias={})
    config.max_new_tokens, config.logits_processors = None, [len]
    assert pickle.loads(pickle.dumps(config)) == config == replace(config)
    numbers = {"top_k": np.int64(5), "temperature": np.float32(0.5), "stop_token_ids": [np.int32(7)]}
    assert GenerationConfig(**numbers, logit_bias={np.int64(3): np.float32(1)}).top_k == 5


def test_a_misspelt_field_cannot_be_set():
    config = GenerationConfig()
    with pytest.raises(AttributeError, match=r"no field 'max_tokens'. Did you mean"):
        config.max_tokens = 3


def test_a_long_value_is_cut_in_the_error():
    with pytest.raises(ConfigError) as caught:
        GenerationConfig(stop_words="x" * 10_000)
    assert len(str(caught.value)) < 400


def test_the_limit_of_stop_words_is_told():
    with pytest.raises(ConfigError, match="at most 1024 of them, with at most 8192 characters together"):
        GenerationConfig(stop_words=["a" * 1_000_000])
    assert GenerationConfig(stop_words=["a" * 8] * 1024).stop_words


def test_defaults_are_lmdeploys():
    config = GenerationConfig()
    got = (config.max_new_tokens, config.do_sample, config.top_p, config.top_k, config.temperature)
    assert got == (512, False, 1.0, 50, 0.8)


def test_an_unknown_field_is_refused():
    with pytest.raises(TypeError, match="response_fromat"):
        GenerationConfig(response_fromat={})


def test_extend_joins_what_is_new_and_takes_the_latest_of_the_rest():
    first = Response("a", 1, 4, None, [1], [{1: -1.0}], [None, {2: -2.0}], np.zeros((1, 3)), cached_tokens=2)
    last = Response(
        "b",
        2,
        4,
        "stop",
        [2],
        [{2: -2.0}],
        None,
        np.ones((2, 3)),
        last_hidden_state=np.ones((1, 2)),
        stop_match="x",
    )
    ids = first.token_ids
    joined = first.extend(last)
    assert joined is first
    assert (joined.text, joined.token_ids, joined.generate_token_len) == ("ab", [1, 2], 2)
    assert (joined.finish_reason, joined.stop_match, joined.cached_tokens) == ("stop", "x", 2)
    assert joined.logprobs == [{1: -1.0}, {2: -2.0}]
    assert joined.prompt_logprobs == [None, {2: -2.0}]
    np.testing.assert_array_equal(joined.logits, np.concatenate([np.zeros((1, 3)), np.ones((2, 3))]))
    np.testing.assert_array_equal(joined.last_hidden_state, np.ones((1, 2)))
    assert ids == [1], "a piece that someone keeps must not change"


def test_a_response_prints_its_text_then_a_line_for_each_field():
    answer = Response("hello\nyou", 2, 3, "stop", [5, 6], logits=np.zeros((2, 7), np.float32))
    answer.choices = [Response("other", 1, 3, "length")]
    lines = str(answer).split("\n")
    assert lines[:5] == ["hello", "you", "generate_token_len=2", "input_token_len=3", "finish_reason=stop"]
    assert "token_ids=[5, 6]" in lines
    assert "logits=float32[2, 7]" in lines
    assert "choices[0]=other" in lines
