"""What a request says about the form of its answer -> the text of a grammar for llguidance."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from llguidance import LLMatcher, grammar_from

from lmdeploy_jax.errors import RequestError
from lmdeploy_jax.guided.lark import literal
from lmdeploy_jax.guided.limits import CHOICES, RULES, check, check_regex, check_rules, check_source
from lmdeploy_jax.guided.schemas import schema_json

# Between JSON tokens: a space, or a new line with its indentation. A model that writes more may never end.
WHITESPACE = r" |\n[ \t]{0,32}"
BEST_EFFORT = {"lenient": True, "coerce_one_of": True}

Format = Mapping[str, Any]


def grammar_text(response_format: Format | None) -> str | None:
    """The grammar that answers must follow; None where any text will do.

    The types, each with a field of its name unless said otherwise:

    text: anything. json_object: a JSON object, no field.
    json_schema: `{"name": …, "schema": {…}}`. The schema is enforced, `strict` or not, and refused where it
        uses keywords that cannot be, unless it says `"x-guidance": {"lenient": true}`.
    regex_schema, regex: a regular expression that the whole answer matches (Rust's syntax, no look-around).
    choice: a list of texts, one of which is the answer.
    grammar: a context-free grammar: Lark as llguidance has it, GBNF/EBNF (`root ::= …`), or llguidance's own
        JSON list of grammars.

    A further field, `field`, is what errors call the form where it came by another name.

    Raises `RequestError`; faults inside of a schema, expression or grammar are found when it is compiled.
    """
    if response_format is None:
        return None
    kind = response_format.get("type")
    if kind == "text":
        return None
    if kind not in _WRITERS:
        known = ", ".join(["text", *_WRITERS])
        raise RequestError(f"response_format.type={kind!r} is unknown; choose one of {known}.")
    return _WRITERS[kind](response_format)


def described(response_format: Format) -> str:
    """What errors call it."""
    grammar = response_format.get("grammar")
    if isinstance(grammar, Written):
        return grammar.name
    return response_format.get("field") or f"response_format of type {response_format['type']!r}"


def _place(response_format: Format, inner: str) -> str:
    """Where the form's field stands in the request, for errors."""
    return response_format.get("field") or f"response_format.{inner}"


class Written(str):
    """A grammar that this package has written from parts that it has checked.

    name: what errors call it. parts: grammars by the name of what they come from, one of which is to blame
        where the whole has a fault.
    """

    name: str
    parts: Mapping[str, str]

    def __new__(cls, text: str, name: str, parts: Mapping[str, str]) -> Written:
        made = super().__new__(cls, text)
        made.name, made.parts = name, parts
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        return Written, (str(self), self.name, self.parts)


def parts_of(response_format: Format) -> Mapping[str, str]:
    """Of a grammar that was written: see `Written`."""
    grammar = response_format.get("grammar")
    return grammar.parts if isinstance(grammar, Written) else {}


def json_grammar(schema: Mapping[str, Any], strict: bool, name: str) -> str:
    """`%json …` for a Lark grammar. Unless `strict`, keywords that cannot be enforced are left out.

    schema: as `schema_json` gives it. name: where the request holds it, for errors.
    """
    return f"%json {json.dumps(_with_options(schema, {} if strict else BEST_EFFORT, name))}"


def _with_options(schema: Mapping[str, Any], options: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The schema with llguidance's options, which give way to those that it holds itself."""
    own = schema.get("x-guidance")
    if not isinstance(own, dict | None):
        raise RequestError(f"{name}.x-guidance={own!r} is invalid: it must be an object of options.")
    return {**schema, "x-guidance": {"whitespace_pattern": WHITESPACE, **options, **(own or {})}}


def _json_object(response_format: Format) -> str:
    return _schema_text({"type": "object"}, _place(response_format, "type"))


def _json_schema(response_format: Format) -> str:
    inner = _field(response_format, "json_schema", dict, "an object with a 'schema'")
    schema = inner.get("schema")
    place = _place(response_format, "json_schema.schema")
    if not isinstance(schema, dict):
        raise RequestError(f"{place}={schema!r} is invalid: it must be an object.")
    return _schema_text(schema, place)


def _schema_text(schema: Mapping[str, Any], name: str) -> str:
    return LLMatcher.grammar_from_json_schema(json.dumps(_with_options(schema_json(schema, name), {}, name)))


def _regex(response_format: Format) -> str:
    kind = str(response_format["type"])
    pattern = _field(response_format, kind, str, "a regular expression")
    check_source(pattern, _place(response_format, kind))
    check_regex(pattern, _place(response_format, kind))
    return LLMatcher.grammar_from_regex(pattern)


def _choice(response_format: Format) -> str:
    choices = _field(response_format, "choice", list, "a list of texts")
    place = _place(response_format, "choice")
    check("number of texts", len(choices), CHOICES, place)
    if not choices or not all(isinstance(text, str) and text for text in choices):
        raise RequestError(f"{place}={choices!r} is invalid: it must be a list of texts, none of them empty.")
    # One terminal: the parser would follow thousands of rules side by side, the lexer has one automaton.
    union = " | ".join(map(literal, choices))
    check_source(union, place)
    return f"start: CHOICE\nCHOICE: {union}"


def _grammar(response_format: Format) -> str:
    text = _field(response_format, "grammar", str, "a text: a Lark or GBNF grammar")
    if isinstance(text, Written):
        return str(text)  # pickled as plain text: other processes need no parts
    place = _place(response_format, "grammar")
    check_source(text, place)
    if text.lstrip().startswith("{"):
        return _grammar_list(text, place)
    check_rules(text, place)
    try:
        return grammar_from("grammar", text)
    except ValueError as error:
        raise RequestError(f"{place} cannot be read: {error}") from error


def _grammar_list(text: str, place: str) -> str:
    """llguidance's own JSON: grammars that refer to each other by name."""
    try:
        read = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{place} begins with a brace, but is no JSON: {error}") from error
    grammars = read.get("grammars")
    if not grammars or not isinstance(grammars, list) or not all(isinstance(g, dict) for g in grammars):
        raise RequestError(
            f"{place} is a JSON object, but not llguidance's: it must hold a list 'grammars' "
            "of objects, each with a lark_grammar or a json_schema."
        )
    check("number of grammars", len(grammars), RULES, place)
    for i, grammar in enumerate(grammars):
        _check_part(grammar, f"{place}.grammars[{i}]")
    return json.dumps(read)


def _check_part(grammar: dict[str, Any], name: str) -> None:
    if isinstance(grammar.get("json_schema"), dict):
        grammar["json_schema"] = schema_json(grammar["json_schema"], f"{name}.json_schema")
    if isinstance(grammar.get("lark_grammar"), str):
        check_rules(grammar["lark_grammar"], f"{name}.lark_grammar")


def _field(response_format: Format, name: str, kind: type, expected: str) -> Any:
    value = response_format.get(name)
    if not isinstance(value, kind):
        raise RequestError(f"response_format.{name}={value!r} is invalid: it must be {expected}.")
    return value


_WRITERS: dict[str, Callable[[Format], str]] = {
    "json_object": _json_object,
    "json_schema": _json_schema,
    "regex_schema": _regex,
    "regex": _regex,
    "choice": _choice,
    "grammar": _grammar,
}
