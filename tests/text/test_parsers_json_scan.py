"""The JSON scanner against Python's json module, and schema coercion."""

from __future__ import annotations

import json
from typing import Any, NoReturn

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmdeploy_jax.text.parsers.json_scan import SPACE, JsonScanner
from lmdeploy_jax.text.parsers.schema import coerce, value_types

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
LAYOUTS = st.sampled_from([{}, {"ensure_ascii": False}, {"indent": 1}, {"separators": (",", ":")}])
JSON_BITS = st.lists(
    st.sampled_from([*'{}[]:,"\\ \n-+.eE0129utfna', '"a"', "true", "null", "\\u00e9", "\\n", "1e5", "{}"])
)


def refuse(constant: str) -> NoReturn:
    raise ValueError(constant)


def is_json(text: str) -> bool:
    try:
        json.loads(text, parse_constant=refuse)
    except ValueError:
        return False
    return True


def scan(text: str) -> JsonScanner | None:
    scanner = JsonScanner()
    return scanner if all(map(scanner.push, text)) else None


@settings(max_examples=300, deadline=None, derandomize=True)
@given(VALUES, LAYOUTS)
def test_json_is_accepted_and_complete_only_as_a_whole(value: Any, layout: dict[str, Any]) -> None:
    text = json.dumps(value, **layout)
    scanner = JsonScanner()
    for end, char in enumerate(text, start=1):
        assert scanner.push(char)
        assert scanner.complete == is_json(text[:end])


@settings(max_examples=1500, deadline=None, derandomize=True)
@given(JSON_BITS.map("".join))
def test_complete_exactly_where_json_is_valid(text: str) -> None:
    scanner = scan(text)
    assert (scanner is not None and scanner.complete) == is_json(text)


@settings(max_examples=500, deadline=None, derandomize=True)
@given(JSON_BITS.map("".join))
def test_an_accepted_prefix_can_be_completed(text: str) -> None:
    """What the scanner accepts is a prefix of some JSON: a bounded search finds the rest."""
    if (scanner := scan(text)) is None:
        return
    for _ in range(6 * len(text) + 6):
        if scanner.complete:
            break
        # First what ends something; a value or a key only where nothing can be ended.
        char = next(c for c in '"}]:n0auelrs1' if scanner.push(c))
        text += char
    assert is_json(text)


def test_a_refused_character_changes_nothing() -> None:
    scanner = scan('{"a": 1')
    assert scanner is not None
    assert not scanner.push("x")
    assert not scanner.push("")
    assert scanner.push("}")
    assert scanner.complete


def test_no_nesting_is_too_deep() -> None:
    scanner = scan("[" * 100_000 + "]" * 100_000)
    assert scanner is not None
    assert scanner.complete


def test_space_is_jsons_space_only() -> None:
    assert scan(SPACE + "1") is not None
    assert scan("\u00a01") is None


PARAMETERS = {
    "properties": {
        "text": {"type": "string"},
        "many": {"type": ["integer", "null"]},
        "either": {"anyOf": [{"type": "string"}, {"type": "boolean"}]},
        "unit": {"enum": ["C", "F"]},
        "fixed": {"const": 3},
        "point": {"$ref": "#/$defs/Point"},
        "circle": {"$ref": "#/$defs/Circle"},
        "odd": {"type": 5, "anyOf": "x"},
        "lost": {"$ref": "elsewhere#/x"},
        "untyped": {"description": "anything"},
    },
    "$defs": {"Point": {"type": "object"}, "Circle": {"$ref": "#/$defs/Circle"}},
}
ALL = {"string", "number", "integer", "boolean", "null", "array", "object"}


@pytest.mark.parametrize(
    ("key", "types"),
    [
        ("text", {"string"}),
        ("many", {"integer", "null"}),
        ("either", {"string", "boolean"}),
        ("unit", {"string"}),
        ("fixed", {"integer", "number"}),
        ("point", {"object"}),
        *((key, ALL) for key in ("circle", "odd", "lost", "untyped")),
        ("undeclared", {"string"}),
    ],
)
def test_types_of_a_parameter(key: str, types: set[str]) -> None:
    assert value_types(PARAMETERS, key) == types


@pytest.mark.parametrize("parameters", [{}, {"properties": 3}, {"properties": []}])
def test_what_no_schema_names_is_text(parameters: dict[str, Any]) -> None:
    assert value_types(parameters, "x") == {"string"}


@pytest.mark.parametrize(
    "parameters",
    [
        {"additionalProperties": {"type": "integer"}, "properties": {"y": {"type": "string"}}},
        {"$ref": "#/$defs/all", "$defs": {"all": {"properties": {"x": {"type": "integer"}}}}},
        {"allOf": [{"properties": {"y": {}}}, {"$ref": "#/$defs/x"}, 3],
         "$defs": {"x": {"$ref": "#/$defs/x", "properties": {"x": {"type": "integer"}}}}},
    ],
)  # fmt: skip
def test_a_parameter_may_be_declared_elsewhere(parameters: dict[str, Any]) -> None:
    assert value_types(parameters, "x") == {"integer"}


@pytest.mark.parametrize(
    ("text", "types", "expected"),
    [
        ("12", {"integer"}, "12"),
        ("12.0", {"integer"}, "12"),
        ("12.5", {"integer"}, '"12.5"'),
        ("12.0", {"number"}, "12.0"),
        ("12", {"string"}, '"12"'),
        ("True", {"boolean"}, "true"),
        ("None", {"null", "string"}, "null"),
        (' {"a": [1]}\n', {"object"}, '{"a": [1]}'),
        ("NaN", {"number"}, '"NaN"'),
        ("9" * 5000, {"integer"}, f'"{"9" * 5000}"'),
        ("[" * 100_000, {"array"}, f'"{"[" * 100_000}"'),
        ('é "x"', ALL, '"é \\"x\\""'),
        ("01", ALL, '"01"'),
    ],
)
def test_coercion(text: str, types: set[str], expected: str) -> None:
    assert coerce(text, frozenset(types)) == expected
