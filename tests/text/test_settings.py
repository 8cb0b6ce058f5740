"""The files beside a vocabulary, malformed: a CheckpointError names file and value."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lmdeploy_jax.errors import CheckpointError
from lmdeploy_jax.text.jinja_template import HfChatTemplate
from lmdeploy_jax.text.settings import read_settings


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("added_tokens.json", {"<x>": "7"}, "'7' is no token id"),
        ("added_tokens.json", {"<x>": True}, "True is no token id"),
        ("added_tokens.json", {"<x>": -1}, "-1 is no token id"),
        ("tokenizer_config.json", {"added_tokens_decoder": [1]}, "must be an object"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"7": 3}}, "added token 7 is 3"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"7": {"special": True}}}, "it needs a content"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": {"content": "<x>"}}}, "'x' is no token id"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"9" * 5000: {"content": "a"}}}, "is no token id"),
        ("tokenizer_config.json", {"additional_special_tokens": 3}, "additional_special_tokens is 3"),
        ("special_tokens_map.json", {"extra_special_tokens": "x"}, "extra_special_tokens is 'x'"),
    ],
)
def test_malformed_tokens_are_named(tmp_path: Path, file: str, content: Any, message: str) -> None:
    (tmp_path / file).write_text(json.dumps(content))
    with pytest.raises(CheckpointError) as caught:
        read_settings(tmp_path)
    assert message in str(caught.value)


@pytest.mark.parametrize("source", ["{{", "{{ " + "(" * 5000, "{% for x in %}", "{{ 1 | nofilter }}"])
def test_a_template_that_cannot_be_compiled_is_named(source: str) -> None:
    with pytest.raises(CheckpointError, match="is not valid jinja"):
        HfChatTemplate(source, {})
