"""tiktoken's files: ids are those of its algorithm, of the `regex` library's cuts, and of transformers."""

from __future__ import annotations

import base64
import json
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import regex
import tokenizers
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers, trainers
from transformers.convert_slow_tokenizer import TikTokenConverter

from lmdeploy_jax.errors import CheckpointError
from lmdeploy_jax.text import Tokenizer
from lmdeploy_jax.text.tiktoken_files import HARMONY, KIMI, Encoding
from tests.fuzz import cases, drawn
from tests.text.conftest import CORPUS

RANKS = 450
TEXT = st.text(
    st.sampled_from("aBéÅ ßǅ'sSlL12٣ \n\r\t.,!/—“今天天气很好我日本語도한😀👍🏽\u0301\u200d <|>")
    | st.characters(exclude_categories=["Cs"]),
    max_size=60,
)
WORDS = st.lists(st.sampled_from([*CORPUS[:4], *CORPUS[1].split(), "IT'S", "we'LL"]), max_size=6).map(
    " ".join
)


@cache
def ranks() -> dict[bytes, int]:
    """Single bytes, and what a trainer merges of the corpus."""
    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=RANKS, initial_alphabet=alphabet))
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in printable]
    bytes_of = {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(hidden)}
    vocabulary = sorted(trained.get_vocab().items(), key=lambda item: item[1])
    return {bytes(bytes_of[char] for char in token): rank for token, rank in vocabulary}


def folder_of(path: Path, name: str, config: dict) -> Path:
    lines = (base64.b64encode(token) + b" %d" % rank for token, rank in ranks().items())
    (path / name).write_bytes(b"\n".join(lines) + b"\n")
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


@pytest.fixture
def kimi(tmp_path: Path) -> Path:
    added = {
        str(RANKS + i): {"content": text, "special": True} for i, text in ((0, "[BOS]"), (3, "<|im_end|>"))
    }
    config = {"tokenizer_class": "TikTokenTokenizer", "bos_token": "[BOS]", "added_tokens_decoder": added}
    return folder_of(tmp_path, "tiktoken.model", config)


def reference(encoding: Encoding, text: str) -> list[int]:
    """Of each cut the pair of the lowest rank is merged, until none makes a token."""
    ids = []
    for match in regex.finditer("|".join(encoding.patterns), text, regex.V1):
        parts = [bytes([byte]) for byte in match[0].encode()]
        while True:
            found = [(ranks().get(a + b, RANKS), i) for i, (a, b) in enumerate(pairwise(parts))]
            if not found or min(found)[0] == RANKS:
                break
            at = min(found)[1]
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        ids += [ranks()[part] for part in parts]
    return ids


class Converter(TikTokenConverter):
    """transformers', which reads the file through the library that downloads such ones."""

    @staticmethod
    def load_tiktoken_bpe(tiktoken_url: str) -> dict[bytes, int]:
        return ranks()


@cases(2000)
@pytest.mark.parametrize("encoding", [KIMI, HARMONY], ids=["kimi", "harmony"])
def test_ids_are_those_of_tiktoken_and_of_transformers(
    encoding: Encoding, cases: int, tmp_path: Path
) -> None:
    name, config = ("tiktoken.model", {"tokenizer_class": "TikTokenTokenizer"})
    if encoding is HARMONY:
        name, config = "o200k_harmony.tiktoken", {}
    ours = Tokenizer(folder_of(tmp_path, name, config))
    theirs = Converter("", "|".join(encoding.patterns)).converted()

    @drawn(cases)
    @given(TEXT | WORDS)
    def check(text: str) -> None:
        assume("<|" not in text and "[" not in text)  # special tokens, which Hypothesis finds in the code
        ids = ours.encode(text)
        assert ids == reference(encoding, text) == theirs.encode(text, add_special_tokens=False).ids
        assert ours.decode(ids) == text

    check()


def test_special_tokens_have_the_ids_that_the_files_say_and_gaps_are_filled(kimi: Path) -> None:
    ours = Tokenizer(kimi)
    assert ours.bos_token_id == RANKS
    assert ours.encode("[BOS]a<|im_end|>") == [RANKS, ours.token_to_id("a"), RANKS + 3]
    assert ours.token_to_id("<|reserved_token_451|>") == RANKS + 1
    assert len(ours) == RANKS + 256
    assert ours.decode([RANKS, ours.token_to_id("a"), RANKS + 3]) == "a"
    assert ours.decode([RANKS + 3], skip_special_tokens=False) == "<|im_end|>"


def test_broken_files_are_explained(kimi: Path) -> None:
    (kimi / "tiktoken.model").write_text("IQ== 0\nno\n")
    with pytest.raises(CheckpointError, match="line 2 is no token in base64 and a rank"):
        Tokenizer(kimi)
    (kimi / "tiktoken.model").write_text("IQ== 0\n")
    with pytest.raises(CheckpointError, match="lacks tokens of single bytes"):
        Tokenizer(kimi)
