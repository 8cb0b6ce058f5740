"""The tokens of a text among all of an answer's, however the answer comes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lmdeploy_jax.messages import GenerationConfig, Response
from lmdeploy_jax.server.chat.reader import AnswerReader
from lmdeploy_jax.server.responses.text_logprobs import TextLogprobs
from lmdeploy_jax.text.parsers import AnswerParser, ContentDelta, reasoning_format, tool_format
from tests.scripted import TOKENIZER, ids

THOUGHT = "<think>\nin it, in a\n</think>\n\n"
CALL = '\n<tool_call>\n{"name": "f", "arguments": {"x": "in it"}}\n</tool_call>'
ANSWERS = [
    ("in it", "in it"),
    (THOUGHT + "in it", "in it"),
    ("a < b, naïve 🙂 <t", "a < b, naïve 🙂 <t"),
    ("in it" + CALL, "in it"),
    (THOUGHT + "a a a" + CALL, "a a a"),
    (CALL, ""),
]


def pieces(tokens: list[int], width: int) -> Iterator[Response]:
    """An answer that comes so many tokens at a time."""
    said = ""
    for start in range(0, len(tokens), width):
        more = start + width < len(tokens)
        text = TOKENIZER.decode(tokens[: start + width], skip_special_tokens=True)
        text = text.rstrip("\ufffd") if more else text  # of a character whose rest is still to come
        some = tokens[start : start + width]
        logprobs = [{i: -1.0} for i in some]
        yield Response(text[len(said) :], start, 1, None if more else "stop", some, logprobs)
        said = text


@pytest.mark.parametrize("width", [1, 2, 3, 1000])
@pytest.mark.parametrize(("text", "content"), ANSWERS)
def test_its_tokens_are_found(text, content, width):
    parser = AnswerParser(reasoning_format("default"), tool_format("qwen"))
    reader = AnswerReader(0, GenerationConfig(), parser)
    logprobs, found = TextLogprobs(TOKENIZER, 0), []
    for piece in pieces(ids(text), width):
        delta = reader.read(piece)
        told = logprobs.read(delta)
        assert all(
            isinstance(e, ContentDelta) or not entries for e, entries in zip(delta.events, told, strict=True)
        )
        found += [entry for entries in told for entry in entries]
    said = b"".join(bytes(entry["bytes"]) for entry in found).decode()
    assert said.strip() == content
