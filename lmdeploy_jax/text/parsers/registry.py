"""Formats by name. A plug-in registers its own before the server starts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

from lmdeploy_jax.errors import ConfigError
from lmdeploy_jax.text.parsers import harmony, json_formats, literal_formats, xml_formats
from lmdeploy_jax.text.parsers.block import ReasoningFormat, ToolFormat

F = TypeVar("F")

_TOOL_FORMATS: dict[str, Callable[[], ToolFormat]] = {}
_REASONING_FORMATS: dict[str, Callable[[], ReasoningFormat]] = {}


def register_tool_format(name: str, factory: Callable[[], ToolFormat]) -> None:
    """Makes a tool format known by name. Raises `ConfigError` if the name is taken."""
    _register(_TOOL_FORMATS, "tool", name, factory)


def register_reasoning_format(name: str, factory: Callable[[], ReasoningFormat]) -> None:
    """Makes a reasoning format known by name. Raises `ConfigError` if the name is taken."""
    _register(_REASONING_FORMATS, "reasoning", name, factory)


def tool_format(name: str) -> ToolFormat:
    """The tool format of that name. Raises `ConfigError` listing the names there are."""
    return _look_up(_TOOL_FORMATS, "tool", name)


def reasoning_format(name: str) -> ReasoningFormat:
    """The reasoning format of that name. Raises `ConfigError` listing the names there are."""
    return _look_up(_REASONING_FORMATS, "reasoning", name)


def tool_format_names() -> list[str]:
    return sorted(_TOOL_FORMATS)


def reasoning_format_names() -> list[str]:
    return sorted(_REASONING_FORMATS)


def _register(known: dict[str, Callable[[], F]], what: str, name: str, factory: Callable[[], F]) -> None:
    if not name or name in known:
        raise ConfigError(
            f"{what} parser name {name!r} is empty or taken; choose another than {sorted(known)}."
        )
    known[name] = factory


def _look_up(known: Mapping[str, Callable[[], F]], what: str, name: str) -> F:
    if name not in known:
        raise ConfigError(f"There is no {what} parser {name!r}; choose one of {sorted(known)}.")
    return known[name]()


_BUILT_IN = {
    json_formats.QWEN: ("qwen", "qwen3", "qwen2d5", "hermes", "qwen3_json", "granite4"),
    json_formats.INTERNLM: ("internlm", "intern-s1"),
    json_formats.LLAMA3: ("llama3", "llama3_json", "llama4_json"),
    json_formats.MISTRAL: ("mistral",),
    json_formats.DEEPSEEK_V3: ("deepseek-v3", "deepseek-r1", "deepseek_v3", "deepseek_v31"),
    harmony.HARMONY: ("gpt-oss", "openai"),
    json_formats.KIMI_K2: ("kimi_k2", "kimi-k2"),
    xml_formats.QWEN3CODER: ("qwen3coder", "interns2-preview", "qwen3_coder", "qwen3_xml", "step3p5"),
    xml_formats.GLM4: ("glm4", "glm45", "glm47"),
    xml_formats.MINIMAX_M2: ("minimax_m2",),
    xml_formats.DSML: ("deepseek-v32", "deepseek_v32", "deepseek-v4", "deepseek_v4"),
    literal_formats.PYTHONIC: ("pythonic", "llama4_pythonic", "lfm2"),
    literal_formats.GEMMA4: ("gemma4",),
}
_THINK = (
    *("default", "qwen3", "qwen-qwq", "deepseek-v3", "deepseek-r1", "intern-s1", "glm45"),
    *("deepseek_r1", "deepseek_v3", "glm47", "kimi_k2", "minimax_m2", "nemotron_v3", "step3p5"),
    *("deepseek-v32", "deepseek-v3.2", "deepseek-v4", "deepseek_v4"),
)
"""Names, LMDeploy's and vLLM's, of reasoning between `<think>` and `</think>`."""
for _format, _names in _BUILT_IN.items():
    for _name in _names:
        register_tool_format(_name, lambda _format=_format: _format)  # type: ignore[misc]
for _name in _THINK:
    register_reasoning_format(_name, ReasoningFormat)
for _name in ("gpt-oss", "openai_gptoss"):
    register_reasoning_format(_name, lambda: harmony.HARMONY_THOUGHT)
register_reasoning_format("gemma4", lambda: literal_formats.GEMMA4_THOUGHT)
