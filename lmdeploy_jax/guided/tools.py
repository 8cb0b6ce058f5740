"""Grammars that make a model call tools, in the format that its tool parser reads."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from lmdeploy_jax.errors import RequestError
from lmdeploy_jax.guided.lark import ANY, Writer, literal, without
from lmdeploy_jax.guided.limits import TOOLS, check
from lmdeploy_jax.guided.reasoning import thinking
from lmdeploy_jax.guided.response_format import Written
from lmdeploy_jax.guided.schemas import schema_json
from lmdeploy_jax.guided.tagged import (
    Function,
    dsml_call,
    gemma4_call,
    glm4_call,
    minimax_m2_call,
    pythonic_call,
    qwen3coder_call,
)
from lmdeploy_jax.text.parsers import (
    ReasoningFormat,
    ToolFormat,
    harmony,
    json_formats,
    literal_formats,
    xml_formats,
)
from lmdeploy_jax.text.tokenizer import Tokenizer

# How a call without a tag begins, see the parser of llama3's format.
_BARE_CALL = r'\s*\{\s*"(name|type|arguments|parameters)"'
_NAME = re.compile(r"[^\s<>{}\[\]\"'`;,｜]+")  # a name that every tool parser can read


def tool_grammar(
    tool_format: ToolFormat,
    tools: Iterable[Mapping[str, Any]],
    tokenizer: Tokenizer,
    *,
    name: str | None = None,
    required: bool = True,
    parallel: bool = True,
    reasoning: ReasoningFormat | None = None,
    starts_in_reasoning: bool = False,
    reasoning_forbidden: bool = False,
) -> dict[str, Any]:
    """The response format of an answer that calls tools and says nothing else.

    tools: as OpenAI's API has them; the arguments of every call follow the tool's `parameters`, and where
        these hold what cannot be enforced, a tool with `strict: true` is refused and another does without.
    name: the one tool to be called; None leaves the model the choice (`tool_choice="required"`).
    required: False lets the model talk as well (`tool_choice="auto"`). Once it has begun a call, that is one
        of these tools, and arguments for those with `strict: true` follow their `parameters`, but for what
        cannot be enforced: what was free before is not refused for that.
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
    functions = _functions(tools, name, all_enforced=required)
    writer = Writer(tokenizer)
    style = make_style(writer)
    begin = thinking(
        writer,
        reasoning,
        starts_in_reasoning,
        forbidden=reasoning_forbidden,
        not_within=tool_format.open_tags,
    )
    calls = _calls(writer, style, functions, parallel)
    if required:
        start = f"{begin} {writer.tag(style.tag) if style.tag else ''} {calls}"
    else:
        start = f"{begin} {_talk(writer, style, calls, parallel)}"
    parts = {f"{f.place}.parameters": f"start: {f.json()}" for f in functions}
    grammar = Written(writer.grammar(start), "tools", parts)
    return {"type": "grammar", "grammar": grammar}


def has_grammar(tool_format: ToolFormat) -> bool:
    """Whether calls of this format can be enforced amid talk: special tokens that frame all talk cannot."""
    return tool_format in _STYLES and not tool_format.frames


def _calls(writer: Writer, style: _Style, functions: Iterable[Function], parallel: bool) -> str:
    """One block of calls, without the tag that begins it."""
    call = writer.any_of(style.call(function) for function in functions)
    more = f"({style.between} {call})*" if parallel else ""
    return f"{style.begin} {call} {more} {style.end}"


def _talk(writer: Writer, style: _Style, calls: str, parallel: bool) -> str:
    """Text, in which a tag begins calls."""
    tag, often = style.tag or style.edge_tag, "*" if parallel else "?"
    text, lead = ANY, f"{writer.until(ANY, tag)} {calls}"
    if not style.tag:  # what looks like a call from the answer's start on is one
        text = f"{ANY} & ~/{_BARE_CALL}(?s:.*)/"
        lead = f"({writer.until(text, tag)} {calls} | {calls})"
    return f"({lead}){often} {writer.rule(without(text, tag), 'TEXT')}"


def _functions(tools: Iterable[Mapping[str, Any]], name: str | None, *, all_enforced: bool) -> list[Function]:
    functions = [_function(tool, f"tools[{i}].function", all_enforced) for i, tool in enumerate(tools)]
    check("number of tools", len(functions), TOOLS, "tools")
    chosen = [function for function in functions if name in (None, function.name)]
    if not chosen:
        names = ", ".join(function.name for function in functions) or "none at all"
        asked = "a call is required" if name is None else f"tool {name!r} must be called"
        raise RequestError(f"tool_choice: {asked}, but the tools are: {names}.")
    return chosen


def _function(tool: Mapping[str, Any], place: str, enforced: bool) -> Function:
    function = tool.get("function")
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(name, str) or not _NAME.fullmatch(name):
        raise RequestError(f"tools: {dict(tool)!r} has no function with a usable name.")
    strict = function.get("strict") is True
    if not (enforced or strict):
        return Function(name, {"type": "object"}, place, any_arguments=True)
    parameters = function.get("parameters") or {"properties": {}, "additionalProperties": False}
    if not isinstance(parameters, Mapping) or parameters.get("type", "object") != "object":
        raise RequestError(f"tools: the parameters of {name!r} must be the schema of an object.")
    schema = schema_json({**parameters, "type": "object"}, f"{place}.parameters")
    return Function(name, schema, place, strict and enforced)


@dataclass(frozen=True)
class _Style:
    """How calls are written: the tag that begins a block, what comes between two calls, before the first and
    after the last. edge_tag: one that may begin a block whose calls need none.
    """

    tag: str
    call: Callable[[Function], str]
    between: str
    begin: str = ""
    end: str = ""
    edge_tag: str = ""


def _object(function: Function, arguments: str) -> str:
    """`{"name": …, "arguments": …}`."""
    head = f'{{"name": {literal(function.name)}, "{arguments}": '
    return f"{literal(head)} {function.json()} {literal('}')}"


def _qwen(writer: Writer) -> _Style:
    begin, end = writer.tag("<tool_call>"), writer.tag("</tool_call>")
    return _Style(
        "<tool_call>",
        lambda function: f'"\\n" {_object(function, "arguments")} "\\n" {end}',
        between=f'"\\n" {begin}',
    )


def _internlm(writer: Writer) -> _Style:
    begin, plugin, end = map(writer.tag, ("<|action_start|>", "<|plugin|>", "<|action_end|>"))
    return _Style(
        "<|action_start|>",
        lambda function: f'{plugin} "\\n"? {_object(function, "parameters")} "\\n"? {end}',
        between=f'"\\n" {begin}',
    )


def _llama3(_: Writer) -> _Style:
    return _Style("", partial(_object, arguments="parameters"), between='"; "', edge_tag="<|python_tag|>")


def _mistral(writer: Writer) -> _Style:
    """The vocabulary tells the format's age: a list of objects, or later a block for each call."""
    tag = "[TOOL_CALLS]"
    if writer.special("[ARGS]") is None:
        call = partial(_object, arguments="arguments")
        return _Style(tag, call, between='", "', begin='" "? "["', end='"]"')
    args = writer.tag("[ARGS]")
    return _Style(tag, lambda f: f"{literal(f.name)} {args} {f.json()}", between=writer.tag(tag))


def _deepseek_v3(writer: Writer) -> _Style:
    """V3 and R1 put the arguments into a fence, V3.1 does not; the model knows which it is."""
    begin, end, sep = (writer.tag(f"<｜tool▁{word}｜>") for word in ("call▁begin", "call▁end", "sep"))

    def call(function: Function) -> str:
        arguments = function.json()
        fence = literal(f"{function.name}\n```json\n")
        fenced = f'"function" {sep} {fence} {arguments} "\\n```"'
        return f"{begin} ({fenced} | {literal(function.name)} {sep} {arguments}) {end}"

    return _Style("<｜tool▁calls▁begin｜>", call, '"\\n"?', end=writer.tag("<｜tool▁calls▁end｜>"))


def _kimi_k2(writer: Writer) -> _Style:
    begin, argument, end = (
        writer.tag(f"<|tool_call_{word}|>") for word in ("begin", "argument_begin", "end")
    )

    def call(function: Function) -> str:
        number = literal(f"functions.{function.name}:")
        return f"{begin} {number} /[0-9]{{1,4}}/ {argument} {function.json()} {end}"

    return _Style("<|tool_calls_section_begin|>", call, "", end=writer.tag("<|tool_calls_section_end|>"))


def _minimax_m2(writer: Writer) -> _Style:
    end = writer.tag("</minimax:tool_call>")
    return _Style("<minimax:tool_call>", partial(minimax_m2_call, writer), "", begin='"\\n"', end=end)


def _tagged(call: Callable[[Writer, Function], str], writer: Writer) -> _Style:
    return _Style("<tool_call>", partial(call, writer), between=f'"\\n" {writer.tag("<tool_call>")}')


def _dsml(writer: Writer) -> _Style:
    """V3.2's block; V4 calls it otherwise, and reads this one too."""
    end = writer.tag("</｜DSML｜function_calls>")
    return _Style("<｜DSML｜function_calls>", partial(dsml_call, writer), "", begin='"\\n"', end=end)


def _harmony(writer: Writer) -> _Style:
    """The prompt has begun the first message; each one behind a thought or a call begins itself."""
    start = f'{writer.tag("<|start|>")} "assistant"'
    message, end = writer.tag(" <|constrain|>json<|message|>"), writer.tag("<|call|>")

    def call(function: Function) -> str:
        header = writer.tag(f"<|channel|>commentary to=functions.{function.name}")
        return f"{header} {message} {function.json()} {end}"

    return _Style("", call, start, begin=f"({start})?")


def _pythonic(writer: Writer) -> _Style:
    """The vocabulary tells which tags are around the list; without any, it is bare."""
    for tag, end in literal_formats.PYTHON_TAGS.items():
        if writer.special(tag) is not None:
            return _Style(tag, partial(pythonic_call, writer), '", "', '"["', f'"]" {writer.tag(end)}')
    tag = next(iter(literal_formats.PYTHON_TAGS))
    return _Style("", partial(pythonic_call, writer), '", "', '"["', '"]"', edge_tag=tag)


def _gemma4(writer: Writer) -> _Style:
    tag = "<|tool_call>"
    return _Style(tag, partial(gemma4_call, writer), between=writer.tag(tag))


_STYLES: dict[ToolFormat, Callable[[Writer], _Style]] = {
    json_formats.QWEN: _qwen,
    json_formats.INTERNLM: _internlm,
    json_formats.LLAMA3: _llama3,
    json_formats.MISTRAL: _mistral,
    json_formats.DEEPSEEK_V3: _deepseek_v3,
    json_formats.KIMI_K2: _kimi_k2,
    xml_formats.MINIMAX_M2: _minimax_m2,
    xml_formats.QWEN3CODER: partial(_tagged, qwen3coder_call),
    xml_formats.GLM4: partial(_tagged, glm4_call),
    xml_formats.DSML: _dsml,
    harmony.HARMONY: _harmony,
    literal_formats.PYTHONIC: _pythonic,
    literal_formats.GEMMA4: _gemma4,
}
