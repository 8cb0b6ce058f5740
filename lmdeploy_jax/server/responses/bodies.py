"""POST /v1/responses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from lmdeploy_jax.server.bodies import CacheSalt, Length, ProtocolModel, TopK, TopP
from lmdeploy_jax.server.forms import Form, FormFields, JsonSchema, schema_form

LOGPROBS = "message.output_text.logprobs"  # in `include`
Name = Annotated[str, Field(min_length=1)]


class FunctionTool(ProtocolModel):
    """A tool of the client, in this protocol's flat form."""

    type: Literal["function"]
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class CustomTool(ProtocolModel):
    """A tool of the client that takes a text. format: what that text looks like."""

    type: Literal["custom"]
    name: Name
    description: str | None = None
    format: dict[str, Any] | None = None


class NamespaceTool(ProtocolModel):
    """Tools of the client that belong together."""

    type: Literal["namespace"]
    name: Name
    description: str | None = None
    tools: list[Annotated[FunctionTool | CustomTool, Field(discriminator="type")]]


class HostedTool(ProtocolModel):
    """One that OpenAI runs, or whose form only its models know. It is left out."""

    type: str


def _kind(tool: Any) -> str:
    kind = tool.get("type") if isinstance(tool, dict) else getattr(tool, "type", None)
    return kind if kind in ("function", "custom", "namespace") else "other"


Tool = Annotated[
    Annotated[FunctionTool, Tag("function")]
    | Annotated[CustomTool, Tag("custom")]
    | Annotated[NamespaceTool, Tag("namespace")]
    | Annotated[HostedTool, Tag("other")],
    Discriminator(_kind),
]


class PlainFormat(ProtocolModel):
    type: Literal["text", "json_object"]


class SchemaFormat(JsonSchema):
    type: Literal["json_schema"]


class TextOptions(ProtocolModel):
    """verbosity: a hint to models that were trained for it; templates know none."""

    format: PlainFormat | SchemaFormat | None = None
    verbosity: str | None = None


class Reasoning(ProtocolModel):
    effort: str | None = None


class InputTokensRequest(ProtocolModel):
    """What becomes a prompt."""

    model: str = ""
    input: str | list[dict[str, Any]]
    instructions: str | None = None
    previous_response_id: str | None = None
    text: TextOptions | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["auto", "none", "required"] | dict[str, Any] = "auto"
    parallel_tool_calls: bool = True
    reasoning: Reasoning | None = None
    truncation: Literal["disabled"] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    enable_thinking: bool | None = None


class ResponsesRequest(InputTokensRequest, FormFields):
    """OpenAI's request with LMDeploy's extensions."""

    store: bool = True
    stream: bool = False
    max_output_tokens: Length | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: TopP | None = None

    top_k: TopK | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    cache_salt: CacheSalt | None = None

    metadata: dict[str, Any] | None = None  # given back as it came
    client_metadata: Any = None
    user: Any = None  # about the client's own bookkeeping; nothing follows from them here
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: Any = None
    stream_options: dict[str, Any] | None = None  # obfuscation, which hides lengths from who listens in
    include: list[str] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @property
    def logprobs(self) -> int | None:
        """How many alternatives the text's tokens are told with; None for no log-probabilities."""
        asked = self.top_logprobs or LOGPROBS in (self.include or ())
        return self.top_logprobs or 0 if asked else None

    def _forms(self) -> Iterator[tuple[str, Form]]:
        own = self.text.format if self.text else None
        if isinstance(own, SchemaFormat):
            yield "text.format", schema_form(own.json_schema, "text.format.schema")
        elif own is not None and own.type != "text":
            yield "text.format", {"type": own.type}
        yield from super()._forms()
