"""The tools of a request as functions that a model can call, and how its calls are told.

The tools of a namespace are functions like others; a call says which namespace its tool is from. What OpenAI
runs itself, a local server does not have.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lmdeploy_jax.errors import RequestError
from lmdeploy_jax.server.chat.call import ToolChoice
from lmdeploy_jax.server.chat.custom_tools import custom_function
from lmdeploy_jax.server.chat.hosted_tools import leave_out
from lmdeploy_jax.server.responses.bodies import CustomTool, FunctionTool, InputTokensRequest, NamespaceTool
from lmdeploy_jax.text.conversation import without_nulls
from lmdeploy_jax.text.template_arguments import Tool


@dataclass(frozen=True)
class ClientTool:
    """One that the client runs. name, namespace: as the client knows it."""

    spec: FunctionTool | CustomTool
    namespace: str | None = None

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def is_custom(self) -> bool:
        return isinstance(self.spec, CustomTool)

    def as_function(self, name: str) -> Tool:
        """As every protocol says it, under the name by which the model calls it."""
        spec = self.spec
        if isinstance(spec, CustomTool):
            form = spec.format or {}
            return custom_function(name, spec.description, form if form.get("type") == "grammar" else None)
        said = {"description": spec.description, "parameters": spec.parameters, "strict": spec.strict}
        return {"type": "function", "function": {"name": name, **without_nulls(said)}}


class Toolbox:
    """The tools of one request, by the names by which the model calls them."""

    def __init__(self, body: InputTokensRequest) -> None:
        self._tools: dict[str, ClientTool] = {}
        for tool in sorted(_client_tools(body.tools or ()), key=lambda tool: tool.namespace is not None):
            taken = tool.name in self._tools and tool.namespace is not None
            self._tools[f"{tool.namespace}__{tool.name}" if taken else tool.name] = tool

    @property
    def functions(self) -> list[Tool]:
        return [tool.as_function(name) for name, tool in self._tools.items()]

    def get(self, called: str) -> ClientTool | None:
        """The tool that the model means."""
        return self._tools.get(called)

    def name_of(self, name: str, namespace: str | None = None) -> str:
        """By which the model calls a tool that the client names so; its name where it is not offered."""
        found = (n for n, t in self._tools.items() if t.name == name and namespace in (None, t.namespace))
        return next(found, name)

    def choice(self, asked: str | Mapping[str, Any]) -> ToolChoice:
        """Raises `RequestError` for a tool that is not here."""
        if isinstance(asked, str):
            return ToolChoice(asked)  # type: ignore[arg-type]  # checked by the body
        if asked.get("type") != "allowed_tools":
            return ToolChoice("required", self._named(asked, "tool_choice"))
        mode = asked.get("mode", "auto")
        tools = asked.get("tools")
        if mode not in ("auto", "required") or not isinstance(tools, list):
            raise RequestError(
                "tool_choice: allowed_tools needs tools, a list, and a mode, 'auto' or 'required'.",
                param="tool_choice",
            )
        names = [self._named(tool, f"tool_choice.tools.{i}") for i, tool in enumerate(tools)]
        return ToolChoice(mode, allowed=tuple(names))

    def _named(self, asked: Any, where: str) -> str:
        kind = asked.get("type") if isinstance(asked, Mapping) else asked
        if kind not in ("function", "custom") or not isinstance(asked.get("name"), str):
            raise RequestError(
                f"{where}: this server has no tool of type {kind!r}; name a function or a custom tool.",
                param=where,
            )
        return self.name_of(asked["name"], asked.get("namespace"))


def _client_tools(tools: Iterable[Any]) -> Iterator[ClientTool]:
    for tool in tools:
        if isinstance(tool, NamespaceTool):
            yield from (ClientTool(inner, tool.name) for inner in tool.tools)
        elif isinstance(tool, FunctionTool | CustomTool):
            yield ClientTool(tool)
        else:
            leave_out(tool.type)
