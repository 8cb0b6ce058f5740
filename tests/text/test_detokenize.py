"""Streams of text: any split of the ids gives the text of the whole, and never half a character."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from lmdeploy_jax.text import Tokenizer
from lmdeploy_jax.text.detokenize import DetokenizeState, IncrementalDetokenizer

KINDS = ["byte_level", "metaspace", "internlm2"]
TEXT = "Hello world, 今天天气很好 🧑🏽‍🚀 naïve\n\n  done"


@pytest.fixture(params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return Tokenizer(request.getfixturevalue(request.param))


def pieces(tokenizer: Tokenizer, ids: list[int], cuts: list[int], skip: bool) -> list[str]:
    stream = IncrementalDetokenizer(tokenizer, skip_special_tokens=skip)
    edges = sorted({0, len(ids), *(cut % (len(ids) + 1) for cut in cuts)})
    return [stream.feed(ids[a:b]) for a, b in pairwise(edges)] + [stream.finish()]


def test_any_split_of_any_ids_joins_to_the_whole(tokenizer: Tokenizer) -> None:
    @settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(
        st.lists(st.integers(0, len(tokenizer) + 3), max_size=30),
        st.lists(st.integers(0, 100), max_size=30),
        st.booleans(),
    )
    def check(ids: list[int], cuts: list[int], skip: bool) -> None:
        assert "".join(pieces(tokenizer, ids, cuts, skip)) == tokenizer.decode(ids, skip_special_tokens=skip)

    check()


def test_text_comes_one_token_at_a_time_without_broken_characters(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXT)
    parts = pieces(tokenizer, ids, list(range(len(ids))), True)
    assert "".join(parts) == TEXT
    assert not any("\ufffd" in part for part in parts)
    assert parts[-1] == ""


def test_unfinished_character_is_flushed_at_the_end(byte_level: Path) -> None:
    tokenizer = Tokenizer(byte_level)
    ids = tokenizer.encode("🚀", add_bos=False)[:-1]
    stream = IncrementalDetokenizer(tokenizer)
    assert stream.feed(ids) == ""
    assert stream.finish() == "\ufffd"


def test_prompt_decides_the_first_space(metaspace: Path) -> None:
    tokenizer = Tokenizer(metaspace)
    prompt, answer = tokenizer.encode("Say"), tokenizer.encode("hello", add_bos=False)
    assert IncrementalDetokenizer(tokenizer).feed(answer) == "hello"
    assert IncrementalDetokenizer(tokenizer, [tokenizer.bos_token_id]).feed(answer) == "hello"
    assert IncrementalDetokenizer(tokenizer, prompt).feed(answer) == " hello"


def test_prompt_that_ends_inside_a_character_is_completed(byte_level: Path) -> None:
    tokenizer = Tokenizer(byte_level)
    ids = tokenizer.encode("x🚀y", add_bos=False)
    middle = next(i for i in range(1, len(ids)) if tokenizer.decode(ids[:i]).endswith("\ufffd"))
    stream = IncrementalDetokenizer(tokenizer, ids[:middle])
    assert stream.feed(ids[middle:]) + stream.finish() == "🚀y"


def test_decoders_that_work_on_text(wordpiece: Path) -> None:
    tokenizer, theirs = Tokenizer(wordpiece), PreTrainedTokenizerFast.from_pretrained(wordpiece)
    rng = np.random.default_rng(1)
    for _ in range(30):
        ids = rng.integers(0, len(tokenizer), 20).tolist()
        for cuts in ([], [5, 6, 13], list(range(20))):
            assert "".join(pieces(tokenizer, ids, cuts, True)) == theirs.decode(ids, skip_special_tokens=True)


def test_lmdeploys_incremental_interface(byte_level: Path) -> None:
    tokenizer = Tokenizer(byte_level)
    prompt, answer = tokenizer.encode("Hello"), tokenizer.encode(" 今天 world", add_bos=False)
    state, text, ids = DetokenizeState(len(prompt)), "", list(prompt)
    for token in answer:
        ids.append(token)
        new, state = tokenizer.detokenize_incrementally(ids, state)
        text += new
    assert text == " 今天 world"
    assert state.ids_offset == len(ids)
