"""Messages are brought to one shape, or refused by position."""

from __future__ import annotations

from typing import Any

import pytest

from lmdeploy_jax.errors import RequestError
from lmdeploy_jax.text.conversation import normalise_messages
from tests.text.samples import USER


def test_messages_are_brought_to_one_shape() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "input_text", "text": "b"}]
    call = {"function": {"name": "f", "arguments": '{"x": 1}'}, "id": "7"}
    given = [
        {"role": "developer", "content": parts, "name": "n"}, {"role": "user", "content": None},
        {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "3", "tool_call_id": "7"},
    ]  # fmt: skip
    assert normalise_messages(given) == [
        {"role": "developer", "content": "a\nb", "name": "n"},
        {"role": "user", "content": ""},
        {
            "role": "assistant",
            "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}, "id": "7"}],
        },
        {"role": "tool", "content": "3", "tool_call_id": "7"},
    ]
    assert call["function"]["arguments"] == '{"x": 1}', "the caller's message has been changed"


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({"role": "robot", "content": ""}, r"messages\[1\]: unknown role 'robot'"),
        ({"content": ""}, "unknown role None"),
        ("hi", r"messages\[1\] must be an object"),
        ({"role": "user", "content": 3}, r"messages\[1\].content must be"),
        (
            {"role": "user", "content": [{"type": "image_url"}]},
            r"content\[0\]: images are not supported by this model",
        ),
        ({"role": "user", "content": [{"type": "audio_url"}]}, "audio"),
        ({"role": "user", "content": [{"type": "poem", "text": "x"}]}, "'poem'"),
        ({"role": "user", "content": "", "tool_calls": [{"function": {"name": "f"}}]}, "only the assistant"),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": [1]}}]},
            "JSON object",
        ),
        ({"role": "assistant", "tool_calls": [{"function": {}}]}, r"tool_calls\[0\] must be"),
        ({"role": "assistant", "tool_calls": "f"}, "must be a list"),
    ],
)
def test_bad_messages_are_named_by_position(message: Any, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        normalise_messages([USER, message])


def test_thoughts_go_by_the_names_that_templates_read() -> None:
    (message,) = normalise_messages(
        [{"role": "assistant", "content": "4", "reasoning": "2+2", "reasoning_content": None}]
    )
    assert (message["reasoning_content"], message["thinking"]) == ("2+2", "2+2")


def test_keys_that_are_null_are_left_out() -> None:
    """An OpenAI client's `model_dump()` has them in every turn, and templates print them as the word None."""
    function = {"name": "f", "arguments": {"keep": None}, "strict": None}
    nulls = {"refusal": None, "reasoning_content": None, "audio": None}
    given = [
        {"role": "user", "content": "x", "name": None},
        {"role": "assistant", "content": None, "tool_calls": [{"id": None, "function": function}], **nulls},
        {"role": "assistant", "content": None, "tool_calls": None, **nulls},
    ]
    assert normalise_messages(given) == [
        {"role": "user", "content": "x"},
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"keep": None}}}]},
        {"role": "assistant", "content": ""},
    ]


@pytest.mark.parametrize("text", ["{bad", "[1]", '"x"', "[" * 100_000])
def test_arguments_that_are_no_object_stay_text(text: str) -> None:
    call = {"id": "7", "type": "function", "function": {"name": "f", "arguments": text}}
    (message,) = normalise_messages([{"role": "assistant", "tool_calls": [call]}])
    assert message["tool_calls"][0]["function"]["arguments"] == text


def test_an_empty_conversation_is_refused() -> None:
    with pytest.raises(RequestError, match="at least one message"):
        normalise_messages([])
