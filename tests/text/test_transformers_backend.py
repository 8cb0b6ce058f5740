"""Vocabularies that only transformers reads, and whose code may be run."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from lmdeploy_jax.errors import CheckpointError
from lmdeploy_jax.text import Tokenizer
from lmdeploy_jax.text.detokenize import IncrementalDetokenizer
from tests.text.conftest import CORPUS

CODE = """
import json
from transformers import PreTrainedTokenizer


class LetterTokenizer(PreTrainedTokenizer):
    vocab_files_names = {"vocab_file": "vocab.txt"}

    def __init__(self, vocab_file, **options):
        self.letters = open(vocab_file, encoding="utf-8").read()
        super().__init__(**options)

    @property
    def vocab_size(self):
        return len(self.letters)

    def get_vocab(self):
        return {letter: i for i, letter in enumerate(self.letters)} | self.added_tokens_encoder

    def _tokenize(self, text):
        return [letter for letter in text if letter in self.letters]

    def _convert_token_to_id(self, token):
        return self.letters.find(token)

    def _convert_id_to_token(self, index):
        return self.letters[index]

    def convert_tokens_to_string(self, tokens):
        return "".join(tokens)
"""


@pytest.fixture
def letters(tmp_path: Path) -> Path:
    """A tokenizer of Python code alone."""
    (tmp_path / "tokenization_letters.py").write_text(CODE)
    (tmp_path / "vocab.txt").write_text("abcdefgh ijklmnopqrstuvwxyzéß今天", encoding="utf-8")
    config = {
        "auto_map": {"AutoTokenizer": ["tokenization_letters.LetterTokenizer", None]},
        "tokenizer_class": "LetterTokenizer",
        "eos_token": "<end>",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


def test_code_runs_only_where_it_is_trusted(letters: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match=r"trust_remote_code=True \(--trust-remote-code\), which runs"):
        Tokenizer(letters)
    ours = Tokenizer(letters, trust_remote_code=True)
    theirs = AutoTokenizer.from_pretrained(letters, trust_remote_code=True)
    rng = np.random.default_rng(0)
    for length in range(40):
        text = "".join(rng.choice(list("abc zéß今天!"), length)) + "<end>"
        ids = theirs.encode(text)
        assert ours.encode(text) == ids
        for skip in (True, False):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)
        stream = IncrementalDetokenizer(ours)
        assert "".join(map(stream.feed, ([i] for i in ids))) + stream.finish() == ours.decode(ids)
    assert ours.eos_token_ids == (theirs.eos_token_id,)
    assert len(ours) == len(theirs)


def test_slow_files_become_fast_ones(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"])
    backend.train_from_iterator(CORPUS, trainer)
    backend.model.save(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    ours, theirs = Tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert ours.decoding is not None
    for text in (*CORPUS[:4], " a  b<|endoftext|>"):
        assert ours.encode(text) == theirs.encode(text)
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text), skip_special_tokens=True)


def test_what_is_to_be_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "vocab.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(CheckpointError, match=r"pip install 'lmdeploy_jax\[transformers\]'"):
        Tokenizer(tmp_path)
