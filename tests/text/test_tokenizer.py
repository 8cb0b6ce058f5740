"""Encoding and decoding against transformers and sentencepiece on the same files."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

from lmdeploy_jax.errors import CheckpointError, RequestError
from lmdeploy_jax.text import Tokenizer

FUZZ = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)
TEXTS = [
    "", " ", "Hello world", " leading", "trailing ", "a  b\n\n\tc", "今天天气很好",
    "🧑🏽‍🚀 é é \u200d\x00\x7f",
    "<|im_start|>user\nhi<|im_end|>\n", "<think>x</think>", "</s>after", "<0x41>", "▁mark",
]  # fmt: skip
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@pytest.fixture(params=["byte_level", "metaspace", "wordpiece"])
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def hf(folder: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(folder)


def test_ids_and_text_equal_transformers(folder: Path) -> None:
    ours, theirs = Tokenizer(folder), hf(folder)

    @FUZZ
    @given(ANY_TEXT | st.sampled_from(TEXTS))
    def check(text: str) -> None:
        ids = theirs.encode(text)
        assert ours.encode(text) == ids
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(text, add_special_tokens=False)
        for skip in (True, False):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)

    check()


def test_byte_level_decodes_any_ids_as_transformers(byte_level: Path) -> None:
    ours, theirs = Tokenizer(byte_level), hf(byte_level)
    rng = np.random.default_rng(0)
    for length in (1, 2, 5, 50):
        for _ in range(50):
            ids = rng.integers(0, len(theirs), length).tolist()
            for skip in (True, False):
                assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(
                    ids, skip_special_tokens=skip
                )


def test_vocabulary_equals_transformers(folder: Path) -> None:
    ours, theirs = Tokenizer(folder), hf(folder)
    assert ours.vocab_size == theirs.vocab_size
    assert len(ours) == len(theirs)
    assert ours.get_vocab() == theirs.get_vocab()
    assert (ours.bos_token, ours.bos_token_id) == (theirs.bos_token, theirs.bos_token_id)
    assert (ours.eos_token, ours.eos_token_id) == (theirs.eos_token, theirs.eos_token_id)
    assert {i for i in range(len(ours)) if ours.is_special(i)} == set(theirs.all_special_ids) | {
        i for i, token in theirs.added_tokens_decoder.items() if token.special
    }


def test_sentencepiece_equals_its_library(sp_model: Path) -> None:
    ours = Tokenizer(sp_model)
    native = sentencepiece.SentencePieceProcessor(model_file=str(sp_model / "tokenizer.model"))

    @FUZZ
    @given(ANY_TEXT)
    def check(text: str) -> None:
        ids = native.encode(text)
        assert ours.encode(text) == [native.bos_id(), *ids]
        assert ours.decode(ids) == native.decode(ids)

    check()


def test_sentencepiece_decodes_any_bytes_as_its_library(sp_model: Path) -> None:
    ours = Tokenizer(sp_model)
    native = sentencepiece.SentencePieceProcessor(model_file=str(sp_model / "tokenizer.model"))
    rng = np.random.default_rng(0)
    for _ in range(200):
        ids = rng.integers(3, 280, 12).tolist()  # almost only byte pieces
        assert ours.decode(ids) == native.decode(ids)


@pytest.mark.parametrize(
    "text", ["Hello </s>world", "Hello</s> world</s></s>x", "x", "</s>x y", "a\n\n</s>  "]
)
def test_sentencepiece_prefix_rules_equal_llama_tokenizer(sp_model: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer.model").write_bytes((sp_model / "tokenizer.model").read_bytes())
    config = {"bos_token": "<s>", "eos_token": "</s>", "legacy": False, "add_bos_token": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours, theirs = Tokenizer(tmp_path), LlamaTokenizer.from_pretrained(tmp_path)
    ids = theirs.encode(text)
    assert ours.encode(text) == ids
    for skip in (True, False):
        assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)


def test_sentencepiece_legacy_puts_the_prefix_before_every_piece_of_text(internlm2: Path) -> None:
    ours = Tokenizer(internlm2)
    native = sentencepiece.SentencePieceProcessor(model_file=str(internlm2 / "tokenizer.model"))
    ids = ours.encode("<|im_start|>user\nHello<|im_end|>\n<tool><|plugin|>")
    assert ids == [1, 500, *native.encode("user\nHello"), 501, *native.encode("\n"), 502, 499]
    assert ours.decode(ids) == " user\nHello \n<tool>"[1:]
    assert ours.decode(ids, skip_special_tokens=False) == (
        "<s><|im_start|> user\nHello<|im_end|> \n<tool><|plugin|>"
    )


def test_end_tokens_come_from_both_files(internlm2: Path) -> None:
    ours = Tokenizer(internlm2)
    assert ours.eos_token_id == 2
    assert ours.eos_token_ids == (2, 501)
    assert (ours.vocab_size, len(ours)) == (500, 503)
    assert ours.get_vocab()["<|im_start|>"] == 500
    assert ours.token_to_id("<|plugin|>") == 499


def test_end_token_of_generation_config_alone(wordpiece: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((wordpiece / "tokenizer.json").read_bytes())
    assert Tokenizer(tmp_path).eos_token_id is None
    (tmp_path / "config.json").write_text('{"eos_token_id": 5}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    ours = Tokenizer(tmp_path)
    assert (ours.eos_token_id, ours.eos_token_ids) == (7, (7, 8))


def test_two_leading_bos_become_one(byte_level: Path, caplog: pytest.LogCaptureFixture) -> None:
    ours = Tokenizer(byte_level)
    with caplog.at_level(logging.WARNING, "lmdeploy_jax"):
        ids = ours.encode("<|begin_of_text|>hi")
        assert "two BOS" in caplog.text
    assert ids == ours.encode("hi")
    assert ids[0] == ours.bos_token_id
    assert ours.encode("hi", add_bos=False) == ids[1:]
    assert ours.encode("<|begin_of_text|>hi", add_bos=False) == ids[1:]


def test_tokens_named_beside_tokenizer_json_are_added(byte_level: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((byte_level / "tokenizer.json").read_bytes())
    free = len(Tokenizer(byte_level))
    added = {
        str(free): {"content": "<|new|>", "special": True},
        str(free + 1): {"content": "<b>", "special": False},
    }
    config = {"eos_token": {"content": "<|eos|>"}, "added_tokens_decoder": added}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours = Tokenizer(tmp_path)
    assert ours.encode("<|new|><b><|eos|>", add_special_tokens=False) == [free, free + 1, free + 2]
    assert ours.decode([free, free + 1, free + 2]) == "<b>"
    assert ours.eos_token_id == free + 2


def test_ids_beyond_the_vocabulary_are_empty(folder: Path, internlm2: Path) -> None:
    for ours in (Tokenizer(folder), Tokenizer(internlm2)):
        ids = ours.encode("Hello", add_special_tokens=False)
        strangers = [len(ours), 10**6, 2**40, -1]
        assert ours.decode(strangers + ids + strangers) == ours.decode(ids)
        assert ours.token_to_bytes(10**6) == b""


def test_token_bytes_join_to_the_text(byte_level: Path, internlm2: Path) -> None:
    text = "Hello 今天 🧑🏽‍🚀"
    for path, lead in ((byte_level, ""), (internlm2, " ")):
        ours = Tokenizer(path)
        ids = ours.encode(text, add_special_tokens=False)
        assert b"".join(map(ours.token_to_bytes, ids)) == (lead + text).encode()
    assert Tokenizer(byte_level).token_text(
        Tokenizer(byte_level).encode("é")[1]
    )  # never raises on half characters


def test_indexes_containing_token(byte_level: Path) -> None:
    ours = Tokenizer(byte_level)
    found = ours.indexes_containing_token("el")
    assert found
    assert found == [i for i in range(len(ours)) if "el" in ours.token_text(i)]
    assert ours.indexes_containing_token("quartz") == ours.encode("quartz", add_bos=False)


def test_call_and_offset(byte_level: Path) -> None:
    ours = Tokenizer(byte_level)
    ids = ours.encode("Hello world")
    assert ours("Hello world").input_ids == ids
    assert ours(["Hello world", "x"]).input_ids == [ids, ours.encode("x")]
    assert ours.decode(ids, offset=2) == ours.decode(ids[2:])


def test_lone_surrogates_are_refused(byte_level: Path, internlm2: Path) -> None:
    for path in (byte_level, internlm2):
        with pytest.raises(RequestError, match=r"lone surrogate .*ud83d' stands at character 2"):
            Tokenizer(path).encode("ab\ud83dc")


def test_added_tokens_swallow_space_as_in_transformers(sp_model: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes((sp_model / "tokenizer.model").read_bytes())
    flags = [{"lstrip": True}, {"rstrip": True}, {"lstrip": True, "rstrip": True}, {"single_word": True}, {}]
    plain = {"special": True, "normalized": False, "lstrip": False, "rstrip": False, "single_word": False}
    added = {str(500 + i): plain | {"content": f"<t{i}>"} | flag for i, flag in enumerate(flags)}
    config = {"bos_token": "<s>", "eos_token": "</s>", "legacy": False, "added_tokens_decoder": added}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours, theirs = Tokenizer(tmp_path), LlamaTokenizer.from_pretrained(tmp_path)
    for i in range(len(flags)):
        for text in (f"ab <t{i}> cd", f"ab<t{i}>cd", f"ab  <t{i}>\n\ncd"):
            assert ours.encode(text, add_special_tokens=False) == theirs.encode(
                text, add_special_tokens=False
            ), text


def test_missing_and_broken_files_are_explained(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        Tokenizer(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"neither tokenizer\.json nor tokenizer\.model"):
        Tokenizer(tmp_path)
    (tmp_path / "qwen.tiktoken").write_text("")
    with pytest.raises(CheckpointError, match=r"only qwen\.tiktoken, and transformers cannot read it"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")
    with pytest.raises(CheckpointError, match="not a sentencepiece model"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        Tokenizer(tmp_path)
