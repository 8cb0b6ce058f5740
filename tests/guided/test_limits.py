"""What a form may consist of: told before it is compiled, whatever the door; and everything below works."""

from __future__ import annotations

import json
import random
import sys

import jsonschema
import pytest

from lmdeploy_jax.assets import TINY_CHAT
from lmdeploy_jax.errors import RequestError
from lmdeploy_jax.guided import Grammars, after_reasoning, tool_grammar
from lmdeploy_jax.guided.trials import Trials
from lmdeploy_jax.guided.vocabulary import Vocabulary, tables
from lmdeploy_jax.text.parsers import reasoning_format, tool_format
from lmdeploy_jax.text.tokenizer import Tokenizer
from tests.guided.walks import allowed, text_of, walk

VOCAB = 2570
TOKENIZER = Tokenizer(TINY_CHAT)
GRAMMARS = Grammars(TOKENIZER, VOCAB)


def schema(inner: object) -> dict:
    return {"type": "json_schema", "json_schema": {"schema": inner}}


def lark(text: str) -> dict:
    return {"type": "grammar", "grammar": text}


def raw(*grammars: dict) -> dict:
    return lark(json.dumps({"grammars": grammars}))


def tool(parameters: object, name: str = "f", **fields: object) -> dict:
    return {"type": "function", "function": {"name": name, "parameters": parameters, **fields}}


def calls(*tools: dict, style: str = "qwen") -> dict:
    return tool_grammar(tool_format(style), tools, TOKENIZER)


def nested(levels: int, kind: str) -> dict:
    found: dict = {"type": "integer"}
    for _ in range(levels):
        found = {
            "array": {"type": "array", "items": found, "minItems": 1, "maxItems": 1},
            "object": {"properties": {"a": found}, "required": ["a"], "additionalProperties": False},
            "anyOf": {"anyOf": [found, {"type": "boolean"}]},
            "allOf": {"allOf": [found]},
            "mixed": {"properties": {"a": {"anyOf": [found]}}, "required": ["a"]},
        }[kind]
    return found if kind in ("array", "anyOf", "allOf") else {"type": "object", **found}


def chained(count: int) -> dict:
    defs = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(count - 1)}
    return {"$ref": "#/$defs/d0", "$defs": defs | {f"d{count - 1}": {"const": 7}}}


def rules(count: int, arrow: str = ":", start: str = "start") -> str:
    lines = [f"{start}{arrow} r1", *(f"r{i}{arrow} r{i + 1}" for i in range(1, count - 1))]
    return "\n".join([*lines, f'r{count - 1}{arrow} "a"'])


def properties(count: int, optional: int) -> dict:
    names = [f"p{i}" for i in range(count)]
    required = [name for i, name in enumerate(names) if i * optional // count == (i + 1) * optional // count]
    assert len(names) - len(required) == optional
    return {
        "type": "object",
        "properties": {name: {"type": "boolean"} for name in names},
        "required": required,
        "additionalProperties": False,
    }


@pytest.mark.parametrize(
    ("form", "told"),
    [
        (schema(properties(5001, 0)), "schema: properties of 5001 is above the limit of 5000"),
        (schema(properties(1200, 1001)), "schema: optional properties of 1001 is above the limit of 1000"),
        (schema({"items": properties(1200, 1001)}), "schema.items: optional properties of 1001"),
        (schema(nested(257, "array")), "nesting of 257 is above the limit of 256"),
        (schema(nested(5000, "allOf")), "nested far above the limit of 256"),
        (schema(chained(3000)), "definitions of 3000 is above the limit of 1000"),
        (schema({"enum": list(range(20001))}), "choices of 20001 is above the limit of 20000"),
        (schema({"type": "integer", "multipleOf": 599999}), "multipleOf of 599999 is above the limit of"),
        (schema({"properties": {"a": {"multipleOf": 0.0999983}}}), r"properties.a: multipleOf of 999983"),
        (schema({"description": "a" * 2**19}), "size in bytes of .* is above the limit of 524288"),
        ({"type": "regex", "regex": "a" * 2**20}, "regex: size in bytes of 1048576 is above"),
        ({"type": "choice", "choice": ["a"] * 20001}, "choice: number of texts of 20001 is above"),
        ({"type": "choice", "choice": ["a" * 2**19, "b"]}, "choice: size in bytes"),
        (lark(rules(3000)), "grammar: number of rules of 3000 is above the limit of 1000"),
        (lark(rules(3000).upper().replace("START", "start")), "number of rules of 3000"),
        (lark(rules(5000, " ::=", "root")), "number of rules of 5000"),
        (lark('start: "' + "a" * 2**19 + '"'), "size in bytes"),
        (raw({"lark_grammar": rules(3000)}), r"grammars\[0\].lark_grammar: number of rules of 3000"),
        (raw({"json_schema": {"multipleOf": 599999}}), r"grammars\[0\].json_schema: multipleOf of 599999"),
        (raw(*[{"lark_grammar": "start: @a"}] * 1001), "number of grammars of 1001"),
    ],
)  # fmt: skip
def test_what_is_above_a_limit_is_refused_before_it_is_tried(form, told, monkeypatch):
    monkeypatch.setattr(Trials, "of", lambda self, text: pytest.fail("it was tried"))
    with pytest.raises(RequestError, match=told):
        GRAMMARS.compile(form)
    if not told.startswith("grammar"):
        with pytest.raises(RequestError, match=told):
            after_reasoning(form, TOKENIZER, reasoning_format("default"), True)


@pytest.mark.parametrize("style", ["qwen", "glm4"])
@pytest.mark.parametrize(
    ("parameters", "told"),
    [
        ({"properties": {"a": {"multipleOf": 599999}}}, "parameters.properties.a: multipleOf of 599999"),
        (chained(3000), "parameters: definitions of 3000"),
        (nested(300, "object"), "parameters: nesting of 257"),
        (
            {"properties": {"a": {"type": "int"}}},
            "parameters.properties.a.type='int' is invalid: choose from",
        ),
        ({"properties": {"a": {"type": "object", "x-guidance": 5}}}, None),
        ({"x-guidance": 5}, "parameters.x-guidance=5 is invalid"),
        ({"x-guidance": "lenient"}, "parameters.x-guidance='lenient' is invalid"),
        ({"properties": 5}, "parameters.properties=5 is invalid: it must be an object"),
        ({"properties": {"a": {"enum": 5}}}, "parameters.properties.a.enum=5 is invalid: it must be a list"),
        (
            {"properties": {"a": {"type": "string", "minLength": "x"}}},
            "parameters.properties.a.minLength='x' is invalid",
        ),
        ({"required": 5}, "parameters.required=5 is invalid"),
        ({"required": [{}]}, "parameters.required names {}, which is no text"),
        ({"properties": {"a": {"$ref": "#/$defs/b"}}}, "parameters cannot be used: .*b"),
        (
            {"properties": {"a": {"type": "object", "maxProperties": "x"}}},
            "parameters cannot be used: .*maxProperties",
        ),
        ({"properties": {"a": {"const": object()}}}, "parameters is not JSON"),
    ],
)
def test_a_tools_faults_name_the_tool(parameters, told, style):
    tools = tool({"properties": {}}, "fine"), tool(parameters)
    if told is None:
        return
    with pytest.raises(RequestError, match=rf"tools\[1\].function.{told}"):
        GRAMMARS.compile(calls(*tools, style=style))


def test_too_many_tools():
    with pytest.raises(RequestError, match="tools: number of tools of 513 is above the limit of 512"):
        calls(*[tool({"properties": {}}, f"tool{i}") for i in range(513)])


@pytest.mark.parametrize(
    "inner",
    [
        *(nested(64, kind) for kind in ("array", "object", "anyOf", "allOf", "mixed")),
        nested(250, "array"),
        properties(1000, 300),
        properties(1000, 1000),
        chained(1000),
        {"enum": [f"choice {i}" for i in range(5000)]},
        {"type": "integer", "multipleOf": 9973, "minimum": -12345, "maximum": 10**6 + 7},
        {"type": "number", "multipleOf": 0.01, "minimum": 0, "maximum": 5},
        {"const": "".join(random.Random(0).choices("abc ", k=4000))},
        {"type": "boolean", "description": "a" * 2**18},
        {"type": "boolean", "x-guidance": None},
    ],
)
def test_schemas_within_the_limits_are_followed(inner):
    grammar = GRAMMARS.compile(schema(inner))
    text = text_of(walk(grammar, TOKENIZER, VOCAB, random.Random(1)), TOKENIZER)
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(20_000)  # for jsonschema
    try:
        jsonschema.validate(json.loads(text), inner)
    finally:
        sys.setrecursionlimit(before)


def test_choices_and_rules_within_the_limits_are_followed():
    choices = [f"number {i}" for i in range(5000)]
    form = {"type": "choice", "choice": choices}
    rows = [
        (form, choices),
        (after_reasoning(form, TOKENIZER, reasoning_format("default"), False), None),
        (lark(rules(1000)), "a"),
        (lark(rules(1000).upper().replace("START", "start")), "A"),
        (lark(rules(1000, " ::=", "root")), "a"),
    ]
    for form, texts in rows:
        found = text_of(walk(GRAMMARS.compile(form), TOKENIZER, VOCAB, random.Random(1)), TOKENIZER)
        assert texts is None or found in texts


@pytest.mark.parametrize("style", ["qwen", "mistral", "deepseek-v3", "qwen3coder", "glm4"])
def test_large_tool_lists_are_taken(style):
    """128 small ones, and as many and as large as coding agents send."""
    note = "What this parameter is for, in a sentence or two, as tools for coding have it. " * 12
    text = {"type": "string", "description": note}
    edit = {"type": "object", "properties": {"old": text, "new": text, "all": {"type": "boolean"}}}
    large = properties(8, 5)
    large["properties"] |= {
        "edits": {"type": "array", "items": edit},
        "path": text,
        "how": {"enum": ["a", "b"]},
    }
    assert len(json.dumps(large)) > 3400
    assert GRAMMARS.compile(calls(*[tool(large, f"tool{i}") for i in range(28)], style=style))
    assert GRAMMARS.compile(calls(*[tool(edit, f"tool{i}") for i in range(128)], style=style))


@pytest.mark.parametrize(
    ("form", "told"),
    [
        ({"type": "regex", "regex": r"[^\s\S]"}, "no text fits it"),
        (raw({"lark_grammar": "start: @b"}, {"name": "b", "lark_grammar": "start: @b"}), "no text fits it"),
        (lark('start: "a" b\nb: b "c"'), "it cannot be followed to an end"),
    ],
)
def test_a_form_that_would_fail_in_mid_answer_is_refused(form, told):
    with pytest.raises(RequestError, match=f"cannot be used: .*{told}"):
        GRAMMARS.compile(form)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{}", "must hold a list 'grammars'"),
        ('{"type": "object"}', "must hold a list 'grammars'"),
        ('{"grammars": []}', "must hold a list 'grammars'"),
        ('{"grammars": [5]}', "must hold a list 'grammars'"),
        ("{", "is no JSON"),
        ('{"a":' * 5000, "is no JSON"),
        ('{"grammars": [{}]}', "lark_grammar or json_schema"),
        ("root ::= " + "(" * 5000 + '"a"' + ")" * 5000, "cannot be read"),
        ('start: "' + "\ud800" + '"', "no valid text"),
    ],
)
def test_a_grammar_that_is_none(text, told):
    for form in (
        lambda: lark(text),
        lambda: after_reasoning(lark(text), TOKENIZER, reasoning_format("default")),
    ):
        with pytest.raises(RequestError, match=told):
            GRAMMARS.compile(form())


def test_expressions_keep_every_character():
    for pattern in ("a\\", "\\", "\\\\\\", "é\\"):
        for form in ({"type": "regex", "regex": pattern}, schema({"type": "string", "pattern": pattern}),
                     schema({"type": "object", "patternProperties": {pattern: {}}})):  # fmt: skip
            with pytest.raises(RequestError, match="ends with a lone backslash"):
                GRAMMARS.compile(form)
    for text in ("a\x7fb", "\\", "a/b\\", "\x00\x1f", "\u2028\ufeff", '"', "'", "\r\n", "#"):
        grammar = GRAMMARS.compile({"type": "choice", "choice": [text]})
        assert text_of(walk(grammar, TOKENIZER, VOCAB, random.Random(0)), TOKENIZER) == text
    with pytest.raises(RequestError, match="no valid text"):
        GRAMMARS.compile({"type": "choice", "choice": ["a\ud800"]})


def test_tokens_that_are_too_long_for_llguidance_are_left_out(monkeypatch):
    long = {2000: b"b" * 5000, 2001: b"b" * 1000}
    spelled = Tokenizer.token_to_bytes
    monkeypatch.setattr(Tokenizer, "token_to_bytes", lambda self, i: long.get(i) or spelled(self, i))
    grammar = Grammars(TOKENIZER, VOCAB).compile({"type": "regex", "regex": "b*"})
    assert set(allowed(grammar.matcher([]), VOCAB)) & {2000, 2001} == {2001}


def test_a_panic_is_an_error_of_the_request():
    """llguidance's tree of tokens is 1,023 bytes deep at most."""
    known = Vocabulary([b"a", b"b" * 5000, b"<end>"], [2])
    with pytest.raises(RequestError, match="llguidance cannot handle"):
        tables(known)
    assert "llguidance cannot handle" in Trials(lambda: known).of("start: /a*/").fault
