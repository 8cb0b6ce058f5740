"""POST /v1/messages and /v1/messages/count_tokens."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from lmdeploy_jax.server.bodies import Count, ProtocolModel

Content = str | list[dict[str, Any]]


class InputMessage(ProtocolModel):
    role: Literal["user", "assistant", "system"]
    content: Content


class InputTool(ProtocolModel):
    """A tool of the client. Those that Anthropic runs itself have another `type` and are refused."""

    name: Annotated[str, Field(min_length=1)]
    description: str | None = None
    input_schema: dict[str, Any]
    type: Literal["custom"] | None = None


class InputToolChoice(ProtocolModel):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False


class Thinking(ProtocolModel):
    """Whether the model reasons first. budget_tokens bounds nothing by itself: max_tokens does."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Count | None = None


class CountTokensRequest(ProtocolModel):
    """What becomes a prompt."""

    model: str = ""
    messages: Annotated[list[InputMessage], Field(min_length=1)]
    system: Content | None = None
    tools: list[InputTool] | None = None
    tool_choice: InputToolChoice | None = None
    thinking: Thinking | None = None


class MessagesRequest(CountTokensRequest):
    """Anthropic's request, with LMDeploy's `include_stop_str_in_output`."""

    max_tokens: Annotated[int, Field(ge=1)]
    stop_sequences: list[str] | None = None
    stream: bool = False
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Count | None = None
    include_stop_str_in_output: bool = False

    metadata: dict[str, Any] | None = None  # about the client's own bookkeeping
    service_tier: str | None = None
