"""Tools and variables of templates: one check for every door."""

from __future__ import annotations

from typing import Any

import pytest

from lmdeploy_jax.errors import RequestError
from lmdeploy_jax.text.template_arguments import checked_tools, checked_variables, thinking_is_off


def test_tools_keep_what_is_said_of_them() -> None:
    schema = {"type": "object", "properties": {"x": {"enum": [None, "a"], "default": None}}}
    function = {"name": "f", "description": None, "parameters": schema, "strict": None}
    said = {"name": "f", "parameters": schema}
    assert checked_tools([{"type": "function", "function": function, "id": None}, function]) == [
        {"type": "function", "function": said},
        said,
    ]
    assert function["strict"] is None, "the caller's tool has been changed"


@pytest.mark.parametrize(
    ("tools", "words"),
    [
        ("x", "tools='x' is invalid: it must be a list"),
        ({"function": {"name": "f"}}, "must be a list"),
        (7, "must be a list"),
        ([{"function": {"name": "f"}}, {"a": 1}], r"tools\[1\] must be an object"),
        (["f"], r"tools\[0\] must be"),
        ([{"function": "f"}], r"tools\[0\] must be"),
        ([{"function": {"name": ""}}], r"tools\[0\] must be"),
        ([{"function": {"name": "f", "parameters": []}}], r"tools\[0\]: parameters=\[\]"),
    ],
)
def test_what_is_no_tool_is_named_by_position(tools: Any, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        checked_tools(tools)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        *(
            ({name: 1}, f"{name!r} is set by the request")
            for name in ("messages", "tools", "template", "self")
        ),
        ({"add_generation_prompt": 1}, "add_generation_prompt=1 must be true or false"),
        ({"continue_final_message": "no"}, "must be true or false"),
        ({"reasoning_effort": "banana"}, "reasoning_effort='banana' is unknown; choose one of none, minimal"),
        ({"reasoning_effort": ["low"]}, "is unknown"),
        ({1: 2}, "the name 1 is invalid"),
        ("x", "chat_template_kwargs='x' is invalid"),
    ],
)
def test_what_is_no_variable_is_named(given: Any, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        checked_variables(given)


@pytest.mark.parametrize(
    ("given", "off"),
    [
        ({}, False),
        ({"enable_thinking": True}, False),
        ({"enable_thinking": None}, False),
        ({"enable_thinking": False}, True),
        ({"thinking": False}, True),
        ({"reasoning_effort": "none"}, True),
        ({"reasoning_effort": "minimal"}, False),
    ],
)
def test_whether_thinking_is_off(given: dict[str, Any], off: bool) -> None:
    assert thinking_is_off(checked_variables(given)) is off


def test_no_effort_goes_by_the_name_that_most_templates_read() -> None:
    assert checked_variables({"reasoning_effort": "none"}) == {
        "enable_thinking": False,
        "reasoning_effort": "none",
    }
    assert "enable_thinking" not in checked_variables({"reasoning_effort": "low"})
