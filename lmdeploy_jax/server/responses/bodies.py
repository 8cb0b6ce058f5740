"""POST /v1/responses."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from lmdeploy_jax.server.bodies import CacheSalt, Count, JsonSchema, ProtocolModel


class FunctionTool(ProtocolModel):
    """A tool of the client, in this protocol's flat form."""

    type: Literal["function"]
    name: Annotated[str, Field(min_length=1)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamedTool(ProtocolModel):
    type: Literal["function"]
    name: str


class ToolChoiceAllowed(ProtocolModel):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"] = "auto"
    tools: list[NamedTool]


class PlainFormat(ProtocolModel):
    type: Literal["text", "json_object"]


class SchemaFormat(JsonSchema):
    type: Literal["json_schema"]


class TextOptions(ProtocolModel):
    format: PlainFormat | SchemaFormat | None = None


class Reasoning(ProtocolModel):
    effort: str | None = None


class ResponsesRequest(ProtocolModel):
    """OpenAI's request with LMDeploy's extensions."""

    model: str = ""
    input: str | list[dict[str, Any]]
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool = True
    stream: bool = False
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    text: TextOptions | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: Literal["auto", "none", "required"] | ToolChoiceAllowed | NamedTool = "auto"
    parallel_tool_calls: bool = True
    reasoning: Reasoning | None = None

    top_k: Count | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    cache_salt: CacheSalt | None = None

    metadata: dict[str, Any] | None = None  # given back as it came
    user: str | None = None  # about the client's own bookkeeping; nothing follows from them here
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    include: list[str] | None = None
    truncation: Literal["disabled"] | None = None
