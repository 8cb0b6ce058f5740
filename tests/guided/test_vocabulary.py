"""Every kind of tokenizer: what the grammar forces is what the tokens spell."""

from __future__ import annotations

import json
import random
from functools import partial

import pytest

from lmdeploy_jax.errors import RequestError
from lmdeploy_jax.guided import Grammars
from lmdeploy_jax.guided.vocabulary import Vocabulary, tables
from lmdeploy_jax.text.tokenizer import Tokenizer
from tests.guided.walks import allowed, text_of, walk
from tests.text.conftest import internlm2, sp_model, wordpiece  # noqa: F401

SCHEMA = {"type": "object", "properties": {"größe 1": {"enum": ["x y", "é"]}}, "required": ["größe 1"]}
FORM = {"type": "json_schema", "json_schema": {"schema": SCHEMA | {"additionalProperties": False}}}


@pytest.mark.parametrize("name", ["sp_model", "internlm2"])
def test_sentencepiece(name, request):
    tokenizer = Tokenizer(request.getfixturevalue(name))
    size = len(tokenizer)
    grammar = Grammars(tokenizer, size).compile(FORM)
    for seed in range(8):
        ids = walk(grammar, tokenizer, size, random.Random(seed))
        assert json.loads(text_of(ids, tokenizer))["größe 1"] in ("x y", "é")


@pytest.mark.parametrize("text", ["name", " name", "a b", '{"größe": ', "\n", "é"])
def test_forced_text_is_spelled_without_the_encoders_own_space(text, sp_model):  # noqa: F811
    tokenizer = Tokenizer(sp_model)
    vocabulary = Vocabulary.of(tokenizer, len(tokenizer))
    ids = tables(vocabulary, partial(tokenizer.encode, add_bos=False)).tokenize_str(text)
    assert text_of(ids, tokenizer) == text


def test_special_tokens_are_no_text(internlm2):  # noqa: F811
    tokenizer = Tokenizer(internlm2)
    grammar = Grammars(tokenizer, len(tokenizer)).compile({"type": "regex", "regex": "(?s:.*)"})
    free = set(allowed(grammar.matcher([]), len(tokenizer)))
    special = {i for i in range(len(tokenizer)) if tokenizer.is_special(i)}
    assert special
    assert not free & special


def test_a_tokenizer_without_plain_bytes_is_refused(wordpiece):  # noqa: F811
    tokenizer = Tokenizer(wordpiece)
    with pytest.raises(RequestError, match="not supported with this model"):
        Grammars(tokenizer, len(tokenizer)).compile({"type": "json_object"})
