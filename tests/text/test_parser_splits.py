"""A parsed stream adds up to the parsed whole, however the text is cut."""

import random

import pytest

from lmdeploy_jax.text.parsers.answer import AnswerParser
from lmdeploy_jax.text.parsers.events import collect
from lmdeploy_jax.text.parsers.registry import reasoning_format, tool_format

TEXTS = {
    "qwen": '<think>w</think>ok<tool_call>\n{"name": "f", "arguments": {"a": "}"}}\n</tool_call> <tool_ca',
    "llama3": '<|python_tag|>{"name": "f", "parameters": {"a": 1}}',
    "glm4": "<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>1</arg_value></tool_call>",
}


def parse(name, pieces):
    parser = AnswerParser(reasoning_format("default"), tool_format(name))
    events = [event for piece in pieces for event in parser.feed(piece)]
    return collect([*events, *parser.finish()])


@pytest.mark.parametrize("name", TEXTS)
def test_every_way_to_cut_gives_the_same_answer(name):
    text, rnd = TEXTS[name], random.Random(0)
    whole = parse(name, [text])
    assert [call.name for call in whole.tool_calls] == ["f"]
    for _ in range(300):
        cuts = sorted(rnd.sample(range(len(text) + 1), rnd.randrange(1, 12)))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        assert parse(name, pieces) == whole
