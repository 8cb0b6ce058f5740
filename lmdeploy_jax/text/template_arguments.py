"""What a request gives a chat template beside its messages: tools, and variables of the template's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lmdeploy_jax.errors import RequestError
from lmdeploy_jax.text.conversation import without_nulls

EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
SWITCHES = ("add_generation_prompt", "continue_final_message")  # say how the prompt ends
_RESERVED = ("messages", "tools", "template", "self")
THINKING = ("enable_thinking", "thinking")  # Qwen's and GLM's name for the switch, and DeepSeek's
_EFFORT = "reasoning_effort"
_NO_THOUGHT = ("none", "minimal")  # efforts that are no thinking, where a template can only switch it

Tool = dict[str, Any]  # {"type": "function", "function": {"name": …, "parameters": …}}


def checked_tools(tools: Any) -> list[Tool]:
    """Copies of the tools, without keys that are null; what a schema holds stays as it is.

    A tool is an object with a `function`, or that function itself, as transformers takes it.
    Raises `RequestError` naming the tool by its position.
    """
    if isinstance(tools, str | bytes | Mapping) or not isinstance(tools, Sequence):
        raise RequestError(f"tools={tools!r:.200} is invalid: it must be a list of tools.")
    return [_tool(tool, f"tools[{i}]") for i, tool in enumerate(tools)]


def _tool(tool: Any, where: str) -> Tool:
    bare = isinstance(tool, Mapping) and tool.get("function") is None
    function = tool if bare else tool["function"] if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        raise RequestError(f"{where} must be an object with a 'function' that has a 'name'.")
    parameters = function.get("parameters")
    if not isinstance(parameters, Mapping | None):
        raise RequestError(f"{where}: parameters={parameters!r:.200} must be a JSON schema, an object.")
    said = without_nulls(function)
    return said if bare else without_nulls(tool) | {"function": said}


def checked_variables(given: Any) -> dict[str, Any]:
    """The template's variables, of which None means not given.

    Effort "none" switches thinking off by its other name too, which is the one that most templates read.
    Raises `RequestError` naming the variable.
    """
    if not isinstance(given, Mapping):
        raise RequestError(f"chat_template_kwargs={given!r:.200} is invalid: it must be an object.")
    variables = without_nulls(given)
    for name, value in variables.items():
        _check_variable(name, value)
    no_thinking = {"enable_thinking": False} if variables.get("reasoning_effort") == "none" else {}
    return no_thinking | variables


def for_template(variables: Mapping[str, Any], reads: frozenset[str]) -> dict[str, Any]:
    """The variables with the switch of thinking by the names that the template reads. Where it knows no
    efforts, an effort is a switch too.
    """
    own = [name for name in THINKING if name in reads]
    rest = {name: value for name, value in variables.items() if name not in THINKING}
    given = next((variables[name] for name in THINKING if name in variables), None)
    if own and _EFFORT not in reads and _EFFORT in rest:
        effort = rest.pop(_EFFORT)
        given = effort not in _NO_THOUGHT if given is None else given
    if given is None or not own:
        return dict(variables)
    return rest | {name: variables.get(name, given) for name in own}


def _check_variable(name: Any, value: Any) -> None:
    if not isinstance(name, str):
        raise RequestError(f"chat_template_kwargs: the name {name!r:.200} is invalid: it must be a text.")
    if name in _RESERVED:
        raise RequestError(
            f"The chat template variable {name!r} is set by the request itself. Leave it out of "
            "chat_template_kwargs."
        )
    if name in SWITCHES and not isinstance(value, bool):
        raise RequestError(f"chat_template_kwargs: {name}={value!r:.200} must be true or false.")
    if name == "reasoning_effort" and value not in EFFORTS:
        known = ", ".join(EFFORTS)
        raise RequestError(f"reasoning_effort={value!r:.200} is unknown; choose one of {known}.")


def thinking_is_off(variables: Mapping[str, Any]) -> bool:
    """Whether the variables ask for an answer without reasoning."""
    if variables.get("reasoning_effort") == "none":
        return True
    return any(variables.get(name) is not None and not variables[name] for name in THINKING)
