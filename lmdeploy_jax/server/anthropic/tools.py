"""The tools of a request, as every protocol says them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from lmdeploy_jax.errors import RequestError
from lmdeploy_jax.server.anthropic.bodies import InputTool, InputToolChoice
from lmdeploy_jax.server.anthropic.known_tools import known_tool
from lmdeploy_jax.server.chat.call import ToolChoice
from lmdeploy_jax.server.chat.hosted_tools import leave_out
from lmdeploy_jax.text.template_arguments import Tool

_MODES: dict[str, Any] = {"auto": "auto", "none": "none", "any": "required", "tool": "required"}
_HOSTED = re.compile(r"\w+_\d{8}|mcp_toolset")  # what such types look like
_SCREENS = ("computer_", "browser_")  # the client runs these, but what they take is not known here


def client_tools(tools: Sequence[InputTool]) -> list[Tool]:
    """The tools that the client runs. Raises `RequestError` for one without a schema."""
    return [_tool(tool, f"tools[{i}]") for i, tool in enumerate(tools) if not _is_hosted(tool)]


def tool_choice(choice: InputToolChoice, tools: Sequence[InputTool]) -> ToolChoice:
    """Raises `RequestError` for a tool that is not here."""
    if choice.type != "tool":
        return ToolChoice(_MODES[choice.type])
    if not choice.name:
        raise RequestError("tool_choice.name: type 'tool' needs the name of the tool that must be used.")
    hosted = next((tool for tool in tools if tool.name == choice.name and _is_hosted(tool)), None)
    if hosted is not None:
        raise RequestError(
            f"tool_choice.name: {choice.name!r} is a tool of type {hosted.type!r}, which this server does "
            "not have; offer one that your client runs.",
            param="tool_choice.name",
        )
    return ToolChoice("required", choice.name)


def _is_hosted(tool: InputTool) -> bool:
    """Whether Anthropic would run it; told of once a type."""
    of_the_client = tool.input_schema is not None or tool.type.startswith(_SCREENS) or known_tool(tool.type)
    if of_the_client or not _HOSTED.fullmatch(tool.type):
        return False
    leave_out(tool.type)
    return True


def _tool(tool: InputTool, where: str) -> Tool:
    known = known_tool(tool.type)
    schema, description = tool.input_schema, tool.description
    if schema is None and known is not None:
        schema, description = known.input_schema, description or known.description
    missing = "name" if not tool.name else "input_schema" if schema is None else None
    if missing is not None:
        message = f"{where}.{missing} is missing: a tool of type {tool.type!r} needs one here."
        raise RequestError(message, param=f"{where}.{missing}")
    function: dict[str, Any] = {"name": tool.name, "description": description or ""}
    function |= {"parameters": schema} | ({"strict": True} if tool.strict else {})
    return {"type": "function", "function": function}
