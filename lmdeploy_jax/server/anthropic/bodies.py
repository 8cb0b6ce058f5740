"""POST /v1/messages and /v1/messages/count_tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from lmdeploy_jax.server.bodies import Count, ProtocolModel, TopK, TopP
from lmdeploy_jax.server.forms import Form, FormFields, schema_form

Content = str | list[dict[str, Any]]


class InputMessage(ProtocolModel):
    role: Literal["user", "assistant", "system"]
    content: Content


class InputTool(ProtocolModel):
    """A tool of the client. Those that Anthropic runs itself have another `type` and are left out."""

    name: str = ""
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    strict: bool | None = None
    type: str = "custom"


class InputToolChoice(ProtocolModel):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False


class Thinking(ProtocolModel):
    """Whether the model reasons first. budget_tokens bounds nothing by itself: max_tokens does."""

    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    budget_tokens: Count | None = None


class OutputFormat(ProtocolModel):
    """The form that the answer's text is held to."""

    type: Literal["json_schema"]
    json_schema: dict[str, Any] = Field(alias="schema")


class OutputConfig(ProtocolModel):
    format: OutputFormat | None = None
    effort: str | None = None


class CountTokensRequest(ProtocolModel):
    """What becomes a prompt. output_format: the beta's name for `output_config.format`."""

    model: str = ""
    messages: list[InputMessage] = Field(default_factory=list)
    system: Content | None = None
    tools: list[InputTool] | None = None
    tool_choice: InputToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None

    cache_control: Any = None  # prompts are cached by themselves
    context_management: Any = None  # what may be cleared stays in the prompt
    speed: str | None = None  # about prices and places, of which there are none here
    betas: list[str] | None = None
    inference_geo: str | None = None
    user_profile_id: str | None = None
    workspace_id: str | None = None


class MessagesRequest(CountTokensRequest, FormFields):
    """Anthropic's request, with LMDeploy's extensions. input_ids: a prompt in tokens instead of messages.
    return_token_ids, return_logprob: tell the answer's tokens beside its text.
    """

    max_tokens: Annotated[int, Field(ge=1)]
    stop_sequences: list[str] | None = None
    stream: bool = False
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    include_stop_str_in_output: bool = False
    input_ids: list[int] | None = None
    return_token_ids: bool = False
    return_logprob: bool = False

    metadata: dict[str, Any] | None = None  # about the client's own bookkeeping
    service_tier: str | None = None
    diagnostics: Any = None
    billing_policy: Any = None

    def _forms(self) -> Iterator[tuple[str, Form]]:
        current = self.output_config.format if self.output_config else None
        for name, own in (("output_config.format", current), ("output_format", self.output_format)):
            if own is not None:
                yield name, schema_form(own.json_schema, f"{name}.schema")
        yield from super()._forms()
