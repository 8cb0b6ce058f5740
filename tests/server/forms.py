"""Forms of answers as hypothesis draws them: good ones with what their answers must be, and others."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jsonschema
from hypothesis import strategies as st

DEAR = [
    {"type": "grammar", "grammar": "start: A\nA: /(?s:.*)/ & ~/(?s:.*)(a|b.{50})(?s:.*)/"},
    {
        "type": "json_schema",
        "json_schema": {"schema": {"allOf": [{"multipleOf": m} for m in (9973, 9967)]}},
    },
    {"type": "grammar", "grammar": json.dumps({"grammars": [{"lark_grammar": "start: @b"}] * 900})},
    {"type": "regex", "regex": "((a{0,999}){0,999}){0,999}"},
]


@dataclass(frozen=True)
class Case:
    """A part of a chat request.

    check: raises for an answer's message that has not the form; None where nobody knows what is right.
    """

    body: dict[str, Any]
    check: Callable[[dict[str, Any]], None] | None = None


# -- schemas ----------------------------------------------------------------------------------------------

NAMES = st.sampled_from(["a", "b", "name", "größe", "x y", 'quo"te', "back\\slash", "$ref", "0"])
TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=6)
SCALARS = st.one_of(
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.builds(
        lambda low, size: {"type": "integer", "minimum": low, "maximum": low + size},
        st.integers(-(10**6), 10**6),
        st.integers(0, 1000),
    ),
    st.builds(
        lambda n: {"type": "integer", "multipleOf": n, "minimum": 0, "maximum": 20 * n}, st.integers(1, 99)
    ),
    st.builds(lambda n: {"type": "string", "maxLength": n}, st.integers(0, 5)),
    st.builds(lambda n: {"type": "string", "pattern": f"^[a-c]{{1,{n}}}$"}, st.integers(1, 5)),
    st.builds(
        lambda values: {"enum": values},
        st.lists(st.one_of(TEXTS, st.integers(-99, 99), st.none()), min_size=1, max_size=6),
    ),
    st.builds(lambda value: {"const": value}, st.one_of(TEXTS, st.booleans())),
)


def _objects(inner: st.SearchStrategy[dict]) -> st.SearchStrategy[dict]:
    return st.builds(
        lambda properties, left_out: {
            "type": "object",
            "properties": properties,
            "required": [name for name in properties if name not in left_out],
            "additionalProperties": False,
        },
        st.dictionaries(NAMES, inner, min_size=1, max_size=4),
        st.sets(NAMES, max_size=2),
    )


SCHEMAS = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        _objects(inner),
        st.builds(
            lambda items, most: {"type": "array", "items": items, "maxItems": most}, inner, st.integers(0, 3)
        ),
        st.builds(lambda options: {"anyOf": options}, st.lists(inner, min_size=1, max_size=3)),
    ),
    max_leaves=6,
)


def _recursive(part: dict) -> dict:
    link = {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]}
    node = {"type": "object", "properties": {"v": part, "next": link}, "required": ["v", "next"]}
    return {"$ref": "#/$defs/node", "$defs": {"node": node | {"additionalProperties": False}}}


def _schema_case(schema: dict) -> Case:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    return Case(
        {"response_format": form},
        lambda message: jsonschema.validate(json.loads(message["content"]), schema),
    )


# -- grammars: one tree, in three languages ---------------------------------------------------------------


@dataclass(frozen=True)
class Tree:
    """kind: text, sequence, choice, optional, repeat. rule: whether it has a rule of its own."""

    kind: str
    parts: tuple[Any, ...]
    rule: bool = False

    def regex(self) -> str:
        if self.kind == "text":
            return re.escape(self.parts[0])
        inner = [part.regex() for part in self.parts]
        joined = ("|" if self.kind == "choice" else "").join(f"(?:{part})" for part in inner)
        return f"(?:{joined})" + {"optional": "?", "repeat": "{0,3}"}.get(self.kind, "")

    def grammar(self, arrow: str, rules: list[str]) -> str:
        """Its expression; the rules that it needs are added to `rules`."""
        if self.kind == "text":
            text = json.dumps(self.parts[0], ensure_ascii=False)
        else:
            # llguidance's converter of GBNF writes a repetition of a repetition without the parentheses.
            own_rule = self.kind in ("optional", "repeat")
            inner = [replace(part, rule=part.rule or own_rule).grammar(arrow, rules) for part in self.parts]
            text = f"({(' | ' if self.kind == 'choice' else ' ').join(inner)})"
            text += {"optional": "?", "repeat": "{0,3}"}.get(self.kind, "")
        if self.rule:
            rules.append(f"rule{len(rules)}{arrow} {text}")
            return rules[-1].split(arrow)[0]
        return text


TREES = st.recursive(
    st.builds(lambda text: Tree("text", (text,)), st.text("abcxyz 0189-/", min_size=1, max_size=4)),
    lambda inner: st.builds(
        lambda kind, parts, rule: Tree(
            kind, tuple(parts[:1] if kind in ("optional", "repeat") else parts), rule
        ),
        st.sampled_from(["sequence", "choice", "optional", "repeat"]),
        st.lists(inner, min_size=1, max_size=3),
        st.booleans(),
    ),
    max_leaves=8,
)


def _tree_case(tree: Tree, language: str) -> Case:
    pattern = tree.regex()
    if language == "regex":
        form = {"type": "regex", "regex": pattern}
    else:
        arrow, start = (":", "start") if language == "lark" else (" ::=", "root")
        rules: list[str] = []
        body = tree.grammar(arrow, rules)
        form = {"type": "grammar", "grammar": "\n".join([f"{start}{arrow} {body}", *rules])}

    def check(message: dict[str, Any]) -> None:
        assert re.fullmatch(pattern, message["content"] or "", re.DOTALL), (pattern, message)

    return Case({"response_format": form}, check)


def _choice_case(texts: list[str]) -> Case:
    def check(message: dict[str, Any]) -> None:
        assert message["content"] in texts

    return Case({"response_format": {"type": "choice", "choice": texts}}, check)


# -- tools ------------------------------------------------------------------------------------------------

PARAMETERS = st.one_of(_objects(SCALARS), st.just({"type": "object", "properties": {}}))


def _tool_case(parameters: list[dict], strict: bool) -> Case:
    schemas = {f"tool_{i}": schema for i, schema in enumerate(parameters)}
    tools = [
        {"type": "function", "function": {"name": name, "parameters": schema, "strict": strict}}
        for name, schema in schemas.items()
    ]

    def check(message: dict[str, Any]) -> None:
        assert message["tool_calls"]
        for call in message["tool_calls"]:
            jsonschema.validate(json.loads(call["function"]["arguments"]), schemas[call["function"]["name"]])

    body = {"tools": tools, "tool_choice": "required", "parallel_tool_calls": False}
    return Case(body, check)


GOOD = st.one_of(
    st.builds(_schema_case, st.builds(_recursive, SCALARS)),
    st.builds(_schema_case, SCHEMAS),
    st.builds(_schema_case, SCHEMAS),
    st.builds(_tree_case, TREES, st.sampled_from(["regex", "lark", "gbnf"])),
    st.builds(_tree_case, TREES, st.sampled_from(["regex", "lark", "gbnf"])),
    st.builds(_choice_case, st.lists(TEXTS, min_size=1, max_size=8)),
    st.builds(_tool_case, st.lists(PARAMETERS, min_size=1, max_size=2), st.booleans()),
)

# -- what nobody should send ------------------------------------------------------------------------------

KEYS = st.sampled_from(
    [
        "type",
        "properties",
        "items",
        "anyOf",
        "allOf",
        "oneOf",
        "not",
        "$ref",
        "$defs",
        "enum",
        "const",
        "pattern",
        "patternProperties",
        "multipleOf",
        "minLength",
        "maxLength",
        "minItems",
        "maxItems",
        "required",
        "minimum",
        "maximum",
        "format",
        "additionalProperties",
        "x-guidance",
        "prefixItems",
        "minProperties",
        "if",
        "contains",
    ]
)
ODD_SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**30), 10**30),
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from(
        ["object", "string", "int", "#", "#/$defs/a", "http://x/y", "(", "a\\", "[", "date", "", ".*"]
    ),
    st.text(max_size=5),
)
ODD = st.recursive(
    ODD_SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(KEYS, inner, max_size=5)),
    max_leaves=20,
)


def _nested(levels: int, key: str) -> Any:
    value: Any = {"type": "integer"}
    for _ in range(levels):
        value = {key: [value] if key.endswith("Of") else {"a": value} if key == "properties" else value}
    return value


def _long(count: int, kind: str) -> dict[str, Any]:
    if kind == "choice":
        return {"type": "choice", "choice": [f"text {i}" for i in range(count)]}
    if kind == "schema":
        properties = {f"p{i}": {"type": "integer"} for i in range(count)}
        return {
            "type": "json_schema",
            "json_schema": {"schema": {"type": "object", "properties": properties}},
        }
    if kind == "regex":
        return {"type": "regex", "regex": "(" * count + "a" + ")" * count}
    lines = [f"r{i}: r{i + 1}" for i in range(count)]
    return {"type": "grammar", "grammar": "\n".join(["start: r0", *lines, f'r{count}: "a"'])}


WRONG_FORMS = st.one_of(
    st.builds(lambda schema: {"type": "json_schema", "json_schema": {"schema": schema}}, ODD),
    st.builds(
        lambda levels, key: {"type": "json_schema", "json_schema": {"schema": _nested(levels, key)}},
        st.sampled_from([60, 130, 200]),
        st.sampled_from(["items", "anyOf", "allOf", "properties", "not"]),
    ),
    st.builds(
        _long, st.sampled_from([500, 3000, 12000]), st.sampled_from(["choice", "schema", "regex", "lark"])
    ),
    st.builds(lambda text: {"type": "regex", "regex": text}, st.text("()[]{}*+?|\\^$.-ab09,", max_size=12)),
    st.builds(
        lambda text: {"type": "grammar", "grammar": text},
        st.text('start:root =|"/()[]{}*+?%json@<>ab\n', max_size=40),
    ),
    st.builds(
        lambda text: {"type": "grammar", "grammar": "start: " + text},
        st.text('"a/()|*+?{1,}xA <>', max_size=15),
    ),
    st.builds(lambda value: {"type": "grammar", "grammar": json.dumps({"grammars": [value]})}, ODD),
    st.builds(lambda value: {"type": "choice", "choice": value}, ODD),
)
WRONG = st.one_of(
    st.builds(lambda form: Case({"response_format": form}), WRONG_FORMS),
    st.builds(lambda form: Case({"response_format": form}), WRONG_FORMS),
    st.builds(
        lambda schema: Case(
            {
                "tools": [{"type": "function", "function": {"name": "f", "parameters": schema}}],
                "tool_choice": "required",
            }
        ),
        ODD,
    ),
    st.builds(
        lambda values: Case({"chat_template_kwargs": values}),
        st.dictionaries(
            st.sampled_from(["template", "self", "messages", "tools", "enable_thinking", "x"]), ODD
        ),
    ),
)
# One in 64 is as dear as it may be.
CASES = st.integers(0, 63).flatmap(
    lambda i: (
        st.sampled_from([Case({"response_format": form}) for form in DEAR])
        if i == 63
        else GOOD
        if i < 40
        else WRONG
    )
)
