"""Which formats of tool calls and reasoning a model's answers are read in."""

from __future__ import annotations

from typing import Any

from lmdeploy_jax.errors import RequestError
from lmdeploy_jax.server.options import ServerOptions
from lmdeploy_jax.text.chat_template import ChatTemplate
from lmdeploy_jax.text.parsers import ReasoningFormat, ToolFormat, reasoning_format, tool_format

# What a chat template prints around a call -> its format. The first that fits counts.
_MARKS = (
    ("<|channel|>", "gpt-oss"),
    ("<function=", "qwen3coder"),
    ("<arg_key>", "glm4"),
    ("<tool_call>", "qwen"),
    ("<|tool_call_argument_begin|>", "kimi_k2"),
    ("<minimax:tool_call>", "minimax_m2"),
    ("｜DSML｜", "deepseek-v32"),
    ("<|tool_call>", "gemma4"),
    ("[f(a=", "pythonic"),
    ("<｜tool▁call▁begin｜>", "deepseek-v3"),
    ("[TOOL_CALLS]", "mistral"),
    ("<|action_start|>", "internlm"),
    ("<|python_tag|>", "llama3"),
    ('{"name": "f", "parameters": ', "llama3"),
)
_USER = {"role": "user", "content": "q"}
_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "f",
        "description": "d",
        "parameters": {"type": "object", "properties": {"a": {"type": "string", "description": "d"}}},
    },
}
_CALL = {"type": "function", "id": "call00001", "function": {"name": "f", "arguments": {"a": "v"}}}


def select_parsers(
    options: ServerOptions, template: ChatTemplate
) -> tuple[ToolFormat | None, ReasoningFormat | None]:
    """The formats that the options name, or that the chat template shows. Raises `ConfigError`."""
    tool, thought = parser_names(options, template)
    return (
        None if tool == "none" else tool_format(tool),
        None if thought == "none" else reasoning_format(thought),
    )


def parser_names(options: ServerOptions, template: ChatTemplate) -> tuple[str, str]:
    """What tool calls and reasoning are read as; "none" leaves them in the text."""
    tool, thought = options.tool_call_parser or "auto", options.reasoning_parser or "auto"
    return (
        _shown_calls(template) if tool == "auto" else tool,
        _shown_reasoning(template) if thought == "auto" else thought,
    )


def _shown_calls(template: ChatTemplate) -> str:
    """The format in which the template prints a call."""
    calls: list[dict[str, Any]] = [
        _USER,
        {"role": "assistant", "content": "", "tool_calls": [_CALL]},
        {"role": "tool", "content": "r", "tool_call_id": "call00001", "name": "f"},
    ]
    text = _rendered(template, calls, [_TOOL])
    return next((name for mark, name in _MARKS if mark in text), "none")


def _shown_reasoning(template: ChatTemplate) -> str:
    thinking = {"role": "assistant", "content": "a", "reasoning_content": "t", "thinking": "t"}
    text = _rendered(template, [_USER, thinking], None) + _rendered(template, [_USER], None)
    if "<|channel|>analysis" in text:
        return "gpt-oss"
    if "<|channel>thought" in text:
        return "gemma4"
    return "default" if "<think>" in text else "none"


def _rendered(
    template: ChatTemplate, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None
) -> str:
    try:
        return template.render(messages, tools=tools)
    except RequestError:  # the template knows no tools, or wants another order of roles
        return ""
