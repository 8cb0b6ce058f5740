"""How each model family writes calls: the other direction of the parsers, written apart from them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any

from lmdeploy_jax.text.parsers import (
    AnswerParser,
    Event,
    ParsedAnswer,
    collect,
    reasoning_format,
    tool_format,
)

Arguments = dict[str, Any]
Calls = Sequence[tuple[str, Arguments]]
SCHEMAS: dict[str, dict[str, Any]] = {
    "add": {"properties": {"a": {"type": "integer"}, "b": {"type": "number"}}},
    "write": {
        "properties": {"path": {"type": "string"}, "text": {"type": "string"}, "tags": {"type": "array"}}
    },
    "now": {},
    "f": {},
    "new": {},
}


def dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def text_of(value: Any) -> str:
    return value if isinstance(value, str) else dump(value)


def call_json(name: str, arguments: Arguments, key: str = "arguments") -> str:
    return f'{{"name": {dump(name)}, "{key}": {dump(arguments)}}}'


def qwen(calls: Calls) -> str:
    return "\n".join(f"<tool_call>\n{call_json(*call)}\n</tool_call>" for call in calls)


def internlm(calls: Calls) -> str:
    return "\n".join(
        f"<|action_start|><|plugin|>\n{call_json(*call, key='parameters')}<|action_end|>" for call in calls
    )


def llama3(calls: Calls) -> str:
    return "<|python_tag|>" + "; ".join(call_json(*call, key="parameters") for call in calls)


def llama3_bare(calls: Calls) -> str:
    return ";".join(call_json(*call, key="parameters") for call in calls)


def mistral(calls: Calls) -> str:
    return "[TOOL_CALLS] [" + ", ".join(call_json(*call) for call in calls) + "]"


def mistral_named(calls: Calls) -> str:
    return "".join(f"[TOOL_CALLS]{name}{dump(arguments)}" for name, arguments in calls)


def mistral_args(calls: Calls) -> str:
    return "".join(f"[TOOL_CALLS]{name}[CALL_ID]x1[ARGS]{dump(arguments)}" for name, arguments in calls)


def deepseek_v3(calls: Calls) -> str:
    blocks = (
        f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n{dump(arguments)}\n```<｜tool▁call▁end｜>"
        for name, arguments in calls
    )
    return "<｜tool▁calls▁begin｜>" + "\n".join(blocks) + "<｜tool▁calls▁end｜>"


def deepseek_v31(calls: Calls) -> str:
    blocks = (
        f"<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{dump(arguments)}<｜tool▁call▁end｜>"
        for name, arguments in calls
    )
    return "<｜tool▁calls▁begin｜>" + "".join(blocks) + "<｜tool▁calls▁end｜>"


def qwen3coder(calls: Calls) -> str:
    def parameters(arguments: Arguments) -> str:
        return "".join(f"<parameter={k}>\n{text_of(v)}\n</parameter>\n" for k, v in arguments.items())

    return "\n".join(
        f"<tool_call>\n<function={name}>\n{parameters(arguments)}</function>\n</tool_call>"
        for name, arguments in calls
    )


def glm(calls: Calls, newline: str) -> str:
    def parameters(arguments: Arguments) -> str:
        return "".join(
            f"<arg_key>{k}</arg_key>{newline}<arg_value>{text_of(v)}</arg_value>{newline}"
            for k, v in arguments.items()
        )

    return "\n".join(
        f"<tool_call>{name}{newline}{parameters(arguments)}</tool_call>" for name, arguments in calls
    )


def glm45(calls: Calls) -> str:
    return glm(calls, "\n")


def glm47(calls: Calls) -> str:
    return glm(calls, "")


def kimi_k2(calls: Calls) -> str:
    blocks = (
        f"<|tool_call_begin|>functions.{name}:{i}<|tool_call_argument_begin|>{dump(arguments)}"
        "<|tool_call_end|>"
        for i, (name, arguments) in enumerate(calls)
    )
    return "<|tool_calls_section_begin|>" + "".join(blocks) + "<|tool_calls_section_end|>"


def harmony(calls: Calls) -> str:
    return "<|start|>assistant".join(
        f"<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>{dump(arguments)}<|call|>"
        for name, arguments in calls
    )


def harmony_by_role(calls: Calls) -> str:
    return "".join(
        f"<|start|>assistant to=functions.{name}<|channel|>commentary json<|message|>"
        f"{dump(arguments)}<|call|>"
        for name, arguments in calls
    )


def minimax_m2(calls: Calls) -> str:
    def parameters(arguments: Arguments) -> str:
        return "".join(f'<parameter name="{k}">{text_of(v)}</parameter>\n' for k, v in arguments.items())

    blocks = (f'<invoke name="{name}">\n{parameters(arguments)}</invoke>\n' for name, arguments in calls)
    return "<minimax:tool_call>\n" + "".join(blocks) + "</minimax:tool_call>"


def dsml(calls: Calls) -> str:
    def parameter(key: str, value: Any) -> str:
        text = "true" if isinstance(value, str) else "false"
        return f'<｜DSML｜parameter name="{key}" string="{text}">{text_of(value)}</｜DSML｜parameter>'

    def parameters(arguments: Arguments) -> str:
        return "\n".join(parameter(*pair) for pair in arguments.items())

    blocks = "\n".join(
        f'<｜DSML｜invoke name="{name}">\n{parameters(arguments)}\n</｜DSML｜invoke>'
        for name, arguments in calls
    )
    return f"<｜DSML｜function_calls>\n{blocks}\n</｜DSML｜function_calls>"


def dsml_v4(calls: Calls) -> str:
    return dsml(calls).replace("function_calls", "tool_calls")


def pythonic(calls: Calls) -> str:
    return "[" + ", ".join(f"{name}({python(arguments)})" for name, arguments in calls) + "]"


def python(arguments: Arguments) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in arguments.items())


def pythonic_tagged(calls: Calls) -> str:
    return f"<|python_start|>{pythonic(calls)}<|python_end|>"


def gemma4(calls: Calls) -> str:
    def written(value: Any) -> str:
        match value:
            case str():
                return f'<|"|>{value}<|"|>'
            case list():
                return "[" + ",".join(map(written, value)) + "]"
            case dict():
                return "{" + ",".join(f"{written(k)}:{written(v)}" for k, v in value.items()) + "}"
        return dump(value)

    def parameters(arguments: Arguments) -> str:
        return ",".join(f"{key}:{written(value)}" for key, value in arguments.items())

    return "".join(
        f"<|tool_call>call:{name}{{{parameters(arguments)}}}<tool_call|>" for name, arguments in calls
    )


WRITERS: list[tuple[str, Callable[[Calls], str]]] = [
    ("qwen", qwen),
    ("internlm", internlm),
    ("llama3", llama3),
    ("llama3", llama3_bare),
    ("mistral", mistral),
    ("mistral", mistral_named),
    ("mistral", mistral_args),
    ("deepseek-v3", deepseek_v3),
    ("deepseek-v3", deepseek_v31),
    ("qwen3coder", qwen3coder),
    ("glm4", glm45),
    ("glm47", glm47),
    ("kimi_k2", kimi_k2),
    ("minimax_m2", minimax_m2),
    ("gpt-oss", harmony),
    ("gpt-oss", harmony_by_role),
    ("deepseek-v32", dsml),
    ("deepseek-v4", dsml_v4),
    ("pythonic", pythonic),
    ("llama4_pythonic", pythonic_tagged),
    ("gemma4", gemma4),
]


def new_parser(tools: str | None, reasoning: str | None = None, starts: bool = False) -> AnswerParser:
    return AnswerParser(
        reasoning_format(reasoning) if reasoning else None,
        tool_format(tools) if tools else None,
        SCHEMAS,
        starts,
    )


def stream(parser: AnswerParser, pieces: Iterable[str]) -> list[Event]:
    return [event for piece in pieces for event in parser.feed(piece)] + parser.finish()


def parse(text: str, tools: str | None, reasoning: str | None = None, starts: bool = False) -> ParsedAnswer:
    return collect(stream(new_parser(tools, reasoning, starts), [text]))


def pieces(text: str, cuts: Iterable[int]) -> list[str]:
    """The text cut at the given places."""
    edges = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})
    return [text[a:b] for a, b in pairwise(edges)]
