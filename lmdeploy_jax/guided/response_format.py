"""What a request says about the form of its answer -> the text of a grammar for llguidance."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from llguidance import LLMatcher, grammar_from

from lmdeploy_jax.errors import RequestError

# Between JSON tokens: a space, or a new line with its indentation. More is a model that has lost its way.
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


def json_grammar(schema: Mapping[str, Any], strict: bool) -> str:
    """`%json …` for a Lark grammar. Unless `strict`, keywords that cannot be enforced are left out."""
    return f"%json {json.dumps(_with_options(schema, {} if strict else BEST_EFFORT))}"


def _with_options(schema: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """The schema with llguidance's options, which give way to those that it holds itself."""
    own = schema.get("x-guidance", {})
    return {**schema, "x-guidance": {"whitespace_pattern": WHITESPACE, **options, **own}}


def _json_object(_: Format) -> str:
    return _schema_text({"type": "object"})


def _json_schema(response_format: Format) -> str:
    inner = _field(response_format, "json_schema", dict, "an object with a 'schema'")
    schema = inner.get("schema")
    if not isinstance(schema, dict):
        raise RequestError(f"response_format.json_schema.schema={schema!r} is invalid: it must be an object.")
    return _schema_text(schema)


def _schema_text(schema: Mapping[str, Any]) -> str:
    try:
        return LLMatcher.grammar_from_json_schema(json.dumps(_with_options(schema, {})))
    except (TypeError, ValueError) as error:  # no JSON: a Python object, a cycle, NaN
        raise RequestError(f"response_format.json_schema.schema is not JSON: {error}") from error


def _regex(response_format: Format) -> str:
    pattern = _field(response_format, str(response_format["type"]), str, "a regular expression")
    return LLMatcher.grammar_from_regex(pattern)


def _choice(response_format: Format) -> str:
    choices = _field(response_format, "choice", list, "a list of texts")
    if not choices or not all(isinstance(text, str) and text for text in choices):
        raise RequestError(
            f"response_format.choice={choices!r} is invalid: it must be a list of texts, none of them empty."
        )
    return LLMatcher.grammar_from_lark(
        "start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in choices)
    )


def _grammar(response_format: Format) -> str:
    text = _field(response_format, "grammar", str, "a text: a Lark or GBNF grammar")
    if text.lstrip().startswith("{"):
        return text
    try:
        return grammar_from("grammar", text)
    except ValueError as error:
        raise RequestError(f"response_format.grammar cannot be read: {error}") from error


def _field(response_format: Format, name: str, kind: type, wanted: str) -> Any:
    value = response_format.get(name)
    if not isinstance(value, kind):
        raise RequestError(f"response_format.{name}={value!r} is invalid: it must be {wanted}.")
    return value


_WRITERS: dict[str, Callable[[Format], str]] = {
    "json_object": _json_object,
    "json_schema": _json_schema,
    "regex_schema": _regex,
    "regex": _regex,
    "choice": _choice,
    "grammar": _grammar,
}
