"""Grammars that make a model call tools, in the format that its tool parser reads."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from lmdeploy_jax.errors import RequestError
from lmdeploy_jax.guided.lark import Writer, literal
from lmdeploy_jax.guided.limits import TOOLS, check
from lmdeploy_jax.guided.reasoning import thinking
from lmdeploy_jax.guided.response_format import Written
from lmdeploy_jax.guided.schemas import schema_json
from lmdeploy_jax.guided.tagged import Function, glm4_call, minimax_m2_call, qwen3coder_call
from lmdeploy_jax.text.parsers import ReasoningFormat, ToolFormat, json_formats, xml_formats
from lmdeploy_jax.text.tokenizer import Tokenizer

_NAME = re.compile(r"[^\s<>{}\[\]\"'`;,｜]+")  # a name that every tool parser can read


def tool_grammar(
    tool_format: ToolFormat,
    tools: Iterable[Mapping[str, Any]],
    tokenizer: Tokenizer,
    *,
    name: str | None = None,
    parallel: bool = True,
    reasoning: ReasoningFormat | None = None,
    starts_in_reasoning: bool = False,
    reasoning_forbidden: bool = False,
) -> dict[str, Any]:
    """The response format of an answer that calls tools and says nothing else.

    tools: as OpenAI's API has them; the arguments of every call follow the tool's `parameters`, and where
        these hold what cannot be enforced, a tool with `strict: true` is refused and another does without.
    name: the one tool to be called; None leaves the model the choice (`tool_choice="required"`).
    parallel: whether there may be several calls.
    reasoning: how the model marks its reasoning, which may then come first, unless it is forbidden (see
        `after_reasoning`).

    Raises `RequestError` where there is nothing to call, and for parameters that cannot be enforced.
    """
    make_style = _STYLES.get(tool_format)
    if make_style is None:
        raise RequestError(
            "tool_choice cannot be enforced with this model's tool format, which has no grammar; use 'auto'."
        )
    functions = _functions(tools, name)
    writer = Writer(tokenizer)
    style = make_style(writer)
    begin = thinking(
        writer,
        reasoning,
        starts_in_reasoning,
        forbidden=reasoning_forbidden,
        not_within=tool_format.open_tags,
    )
    call = writer.any_of(style.call(function) for function in functions)
    more = f"({style.between} {call})*" if parallel else ""
    start = f"{begin} {style.begin} {call} {more} {style.end}"
    parts = {f"{f.place}.parameters": f"start: {f.json()}" for f in functions}
    grammar = Written(writer.grammar(start), "tools", parts)
    return {"type": "grammar", "grammar": grammar}


def _functions(tools: Iterable[Mapping[str, Any]], name: str | None) -> list[Function]:
    functions = [_function(tool, f"tools[{i}].function") for i, tool in enumerate(tools)]
    check("number of tools", len(functions), TOOLS, "tools")
    chosen = [function for function in functions if name in (None, function.name)]
    if not chosen:
        names = ", ".join(function.name for function in functions) or "none at all"
        asked = "a call is required" if name is None else f"tool {name!r} must be called"
        raise RequestError(f"tool_choice: {asked}, but the tools are: {names}.")
    return chosen


def _function(tool: Mapping[str, Any], place: str) -> Function:
    function = tool.get("function")
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(name, str) or not _NAME.fullmatch(name):
        raise RequestError(f"tools: {dict(tool)!r} has no function with a usable name.")
    parameters = function.get("parameters") or {"properties": {}, "additionalProperties": False}
    if not isinstance(parameters, Mapping) or parameters.get("type", "object") != "object":
        raise RequestError(f"tools: the parameters of {name!r} must be the schema of an object.")
    schema = schema_json({**parameters, "type": "object"}, f"{place}.parameters")
    return Function(name, schema, place, function.get("strict") is True)


@dataclass(frozen=True)
class _Style:
    """How calls are written: one call, what comes between two, before the first and after the last."""

    call: Callable[[Function], str]
    between: str = '"\\n"'
    begin: str = ""
    end: str = ""


def _object(function: Function, arguments: str) -> str:
    """`{"name": …, "arguments": …}`."""
    head = f'{{"name": {literal(function.name)}, "{arguments}": '
    return f"{literal(head)} {function.json()} {literal('}')}"


def _qwen(writer: Writer) -> _Style:
    begin, end = writer.tag("<tool_call>"), writer.tag("</tool_call>")
    return _Style(lambda function: f'{begin} "\\n" {_object(function, "arguments")} "\\n" {end}')


def _internlm(writer: Writer) -> _Style:
    begin = f"{writer.tag('<|action_start|>')} {writer.tag('<|plugin|>')}"
    end = writer.tag("<|action_end|>")
    return _Style(lambda function: f'{begin} "\\n"? {_object(function, "parameters")} "\\n"? {end}')


def _llama3(_: Writer) -> _Style:
    return _Style(lambda function: _object(function, "parameters"), between='"; "')


def _mistral(writer: Writer) -> _Style:
    """The vocabulary tells the format's age: a list of objects, or later a block for each call."""
    mark = writer.tag("[TOOL_CALLS]")
    if writer.special("[ARGS]") is None:
        call = partial(_object, arguments="arguments")
        return _Style(call, between='", "', begin=f'{mark} " "? "["', end='"]"')
    args = writer.tag("[ARGS]")
    return _Style(lambda f: f"{mark} {literal(f.name)} {args} {f.json()}", between="")


def _deepseek_v3(writer: Writer) -> _Style:
    """V3 and R1 put the arguments into a fence, V3.1 does not; the model knows which it is."""
    begin, end, sep = (writer.tag(f"<｜tool▁{word}｜>") for word in ("call▁begin", "call▁end", "sep"))

    def call(function: Function) -> str:
        arguments = function.json()
        fence = literal(f"{function.name}\n```json\n")
        fenced = f'"function" {sep} {fence} {arguments} "\\n```"'
        return f"{begin} ({fenced} | {literal(function.name)} {sep} {arguments}) {end}"

    marks = (writer.tag(f"<｜tool▁calls▁{word}｜>") for word in ("begin", "end"))
    return _Style(call, '"\\n"?', *marks)


def _kimi_k2(writer: Writer) -> _Style:
    begin, argument, end = (
        writer.tag(f"<|tool_call_{word}|>") for word in ("begin", "argument_begin", "end")
    )

    def call(function: Function) -> str:
        number = literal(f"functions.{function.name}:")
        return f"{begin} {number} /[0-9]/ {argument} {function.json()} {end}"

    marks = (writer.tag(f"<|tool_calls_section_{word}|>") for word in ("begin", "end"))
    return _Style(call, "", *marks)


def _minimax_m2(writer: Writer) -> _Style:
    begin, end = writer.tag("<minimax:tool_call>"), writer.tag("</minimax:tool_call>")
    return _Style(partial(minimax_m2_call, writer), "", f'{begin} "\\n"', end)


_STYLES: dict[ToolFormat, Callable[[Writer], _Style]] = {
    json_formats.QWEN: _qwen,
    json_formats.INTERNLM: _internlm,
    json_formats.LLAMA3: _llama3,
    json_formats.MISTRAL: _mistral,
    json_formats.DEEPSEEK_V3: _deepseek_v3,
    json_formats.KIMI_K2: _kimi_k2,
    xml_formats.MINIMAX_M2: _minimax_m2,
    xml_formats.QWEN3CODER: lambda writer: _Style(partial(qwen3coder_call, writer)),
    xml_formats.GLM4: lambda writer: _Style(partial(glm4_call, writer)),
}
