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

_ARGUMENTS = r"""/([^()"']|"([^"\\]|\\.)*"|'([^'\\]|\\.)*')*\)/"""  # up to the bracket that closes a call
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


def dsml_call(writer: Writer, function: Function) -> str:
    mark, close = "｜DSML｜", _Close("</｜DSML｜parameter>")

    def label(key: str) -> str:
        text = value_types(function.parameters, key) == {"string"}
        return writer.tag(f'<{mark}parameter name="{key}" string="{str(text).lower()}">')

    begin, end = writer.tag(f'<{mark}invoke name="{function.name}">\n'), f"</{mark}invoke>"
    if function.any_arguments:
        return f"{begin} {writer.until(ANY, end, after=chr(10))}"
    parameters = _parameters(writer, function, close, label, not_in_keys='<>\n"')
    return f"{begin} {parameters} {writer.closing(end, '', chr(10))}"


def pythonic_call(writer: Writer, function: Function) -> str:
    """Values are JSON, which its reader takes for such."""

    def argument(key: str) -> str:
        return f"{literal(f'{key}=')} {_json_value(function, key)}"

    if function.any_arguments:
        return f"{literal(function.name + '(')} {writer.rule(_ARGUMENTS, 'TEXT')}"
    arguments = _separated(writer, function, argument, ", ", "<>{}[]()\"'`;,=｜ \n")
    return f"{literal(function.name + '(')} {arguments} {literal(')')}"


def gemma4_call(writer: Writer, function: Function) -> str:
    quote = '<|"|>'

    def argument(key: str) -> str:
        if value_types(function.parameters, key) != {"string"}:
            return f"{literal(f'{key}:')} {_json_value(function, key)}"
        text = _string(writer, function, key, _Close(quote, after=""))
        return f"{literal(f'{key}:')} {writer.tag(quote)} {text}"

    name, end = literal(f"call:{function.name}{{"), "<tool_call|>"
    if function.any_arguments:
        return f"{name} {writer.until(ANY, end, before='}')}"
    arguments = _separated(writer, function, argument, ",", ':{}[],"<\n')
    return f"{name} {arguments} {literal('}')} {writer.tag(end)}"


def _separated(
    writer: Writer, function: Function, argument: Callable[[str], str], comma: str, not_in_keys: str
) -> str:
    """As `_parameters`, with commas between them."""
    keys, required = _checked_keys(function, not_in_keys), function.parameters.get("required", [])
    rules = [writer.rule(argument(key)) for key in keys]
    rest = [f"{literal(comma)} {rule}" for rule in rules]
    rest = [part if key in required else f"({part})?" for key, part in zip(keys, rest, strict=True)]
    starts = []  # by which one is the first of those that are there
    for i, key in enumerate(keys):
        starts.append(" ".join([rules[i], *rest[i + 1 :]]))
        if key in required:
            return f"({' | '.join(starts)})"
    return f"({' | '.join(starts)})?" if starts else ""


def _json_value(function: Function, key: str) -> str:
    parameters = function.parameters
    schema = parameters["properties"][key]
    value = {**schema, **_shared(schema, parameters)} if isinstance(schema, Mapping) else {}
    return json_grammar(value, function.strict, f"{function.place}.parameters.properties.{key}")


def _parameters(
    writer: Writer,
    function: Function,
    close: _Close,
    label: Callable[[str], str],
    not_in_keys: str = "<>\n",
) -> str:
    """All parameters in the schema's order; those that are not required may be left out."""
    keys, required = _checked_keys(function, not_in_keys), function.parameters.get("required", [])
    rules = [writer.rule(f"{label(key)} {_value(writer, function, key, close)}") for key in keys]
    parts = (rule if key in required else f"{rule}?" for key, rule in zip(keys, rules, strict=True))
    return " ".join(parts)


def _checked_keys(function: Function, not_in_keys: str) -> list[str]:
    """The names of the parameters. Raises RequestError for what cannot be enforced."""
    schema = function.parameters
    properties, required = schema.get("properties", {}), schema.get("required", [])
    unknown = {*schema} - _OBJECT_KEYS
    missing = {f"required {key!r}" for key in {*required} - {*properties}}
    if missing or (unknown and function.strict):
        raise _refusal(function, "its parameters", unknown | missing)
    for key in properties:
        if not key or any(char in not_in_keys for char in key):
            raise _refusal(function, f"parameter {key!r}", {"its name"})
    return list(properties)


def _value(writer: Writer, function: Function, key: str, close: _Close) -> str:
    if value_types(function.parameters, key) == {"string"}:
        return _string(writer, function, key, close)
    return f"{_json_value(function, key)} {writer.closing(close.tag, close.before, close.after)}"


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
