"""Grammars of tool calls whose parameters are tagged texts: strings as they are, other values as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lmdeploy_jax.errors import RequestError
from lmdeploy_jax.guided.lark import ANY, Writer, literal
from lmdeploy_jax.guided.response_format import json_grammar
from lmdeploy_jax.text.parsers.schema import resolve, value_types

_NOTES = {"title", "description", "default", "examples", "$schema", "$defs", "definitions", "x-guidance"}
_OBJECT_KEYS = _NOTES | {"type", "properties", "required", "additionalProperties"}
_STRING_KEYS = _NOTES | {"type", "enum", "const", "minLength", "maxLength"}


@dataclass(frozen=True)
class Function:
    """A tool: its name and the JSON schema, of an object, of its arguments. any_arguments: that is of no
    account, and the arguments are whatever the model says.
    """

    name: str
    parameters: Mapping[str, Any]
    place: str  # in the request
    strict: bool = False
    any_arguments: bool = False

    def json(self) -> str:
        """Arguments that are one JSON object."""
        return json_grammar(self.parameters, self.strict, f"{self.place}.parameters")


@dataclass(frozen=True)
class _Close:
    """How a value ends: the tag, and what the format puts around it."""

    tag: str
    before: str = ""
    after: str = "\n"


def qwen3coder_call(writer: Writer, function: Function) -> str:
    close = _Close("</parameter>", before="\n")
    parameters = _parameters(writer, function, close, lambda key: literal(f"<parameter={key}>\n"))
    name = literal(f"\n<function={function.name}>\n")
    if function.any_arguments:
        return f"{name} {writer.until(ANY, '</tool_call>', before='</function>' + chr(10))}"
    return f'{name} {parameters} "</function>\\n" {writer.tag("</tool_call>")}'


def glm4_call(writer: Writer, function: Function) -> str:
    def label(key: str) -> str:
        open_key, close_key, value = map(writer.tag, ("<arg_key>", "</arg_key>", "<arg_value>"))
        return f'{open_key} {literal(key)} {close_key} "\\n" {value}'

    parameters = _parameters(writer, function, _Close("</arg_value>"), label)
    name = literal(function.name + "\n")
    if function.any_arguments:
        return f"{name} {writer.until(ANY, '</tool_call>')}"
    return f"{name} {parameters} {writer.tag('</tool_call>')}"


def minimax_m2_call(writer: Writer, function: Function) -> str:
    parameters = _parameters(
        writer,
        function,
        _Close("</parameter>"),
        lambda key: literal(f'<parameter name="{key}">'),
        not_in_keys='<>\n"',
    )
    name = literal(f'<invoke name="{function.name}">\n')
    if function.any_arguments:
        return f"{name} {writer.until(ANY, '</invoke>', after=chr(10))}"
    return f'{name} {parameters} "</invoke>\\n"'


def _parameters(
    writer: Writer,
    function: Function,
    close: _Close,
    label: Callable[[str], str],
    not_in_keys: str = "<>\n",
) -> str:
    """All parameters in the schema's order; those that are not required may be left out."""
    schema = function.parameters
    properties, required = schema.get("properties", {}), schema.get("required", [])
    unknown = {*schema} - _OBJECT_KEYS
    missing = {f"required {key!r}" for key in {*required} - {*properties}}
    if missing or (unknown and function.strict):
        raise _refusal(function, "its parameters", unknown | missing)
    parts = []
    for key in properties:
        if not key or any(char in not_in_keys for char in key):
            raise _refusal(function, f"parameter {key!r}", {"its name"})
        rule = writer.rule(f"{label(key)} {_value(writer, function, key, close)}")
        parts.append(rule if key in required else f"{rule}?")
    return " ".join(parts)


def _value(writer: Writer, function: Function, key: str, close: _Close) -> str:
    parameters = function.parameters
    schema = parameters["properties"][key]
    if value_types(parameters, key) == {"string"}:
        return _string(writer, function, key, close)
    end = writer.closing(close.tag, close.before, close.after)
    value = {**schema, **_shared(schema, parameters)} if isinstance(schema, Mapping) else {}
    name = f"{function.place}.parameters.properties.{key}"
    return f"{json_grammar(value, function.strict, name)} {end}"


def _shared(schema: Mapping[str, Any], parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The definitions that a part of the schema refers to; most parts refer to none."""
    if '"$ref"' not in json.dumps(schema):
        return {}
    return {name: parameters[name] for name in ("$defs", "definitions") if name in parameters}


def _string(writer: Writer, function: Function, key: str, close: _Close) -> str:
    schema = function.parameters["properties"][key]
    while "$ref" in schema:  # ends: a reference to itself would have no type
        schema = resolve(schema["$ref"], function.parameters)
    unknown = {*schema} - _STRING_KEYS
    if unknown and function.strict:
        raise _refusal(function, f"parameter {key!r}", unknown)
    choices = [schema["const"]] if "const" in schema else schema.get("enum")
    if choices is None:
        least, most = schema.get("minLength", 0), schema.get("maxLength", "")
        least, most = int(least), most if most == "" else int(most)
        body = f"/(?s:.){{{least},{most}}}/" if least or most != "" else ANY
        return writer.until(body, close.tag, close.before, close.after)
    wrong = [text for text in choices if not isinstance(text, str) or close.tag in text]
    if wrong or not choices:
        raise _refusal(function, f"parameter {key!r}", {f"a value with {close.tag}, or one that is no text"})
    return writer.up_to(" | ".join(map(literal, choices)), close.tag, close.before, close.after)


def _refusal(function: Function, what: str, reasons: set[str]) -> RequestError:
    return RequestError(
        f"tools: {what} of {function.name!r} cannot be enforced in this model's tool format because of "
        f"{', '.join(sorted(reasons))}; leave it out of the schema, or let the tool be strict: false under "
        "tool_choice 'auto'."
    )
