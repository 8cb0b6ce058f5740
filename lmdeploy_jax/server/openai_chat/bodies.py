"""POST /v1/chat/completions."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from lmdeploy_jax.server.bodies import CacheSalt, Length, ProtocolModel, SamplingFields, StreamOptions
from lmdeploy_jax.server.forms import FormFields


class Function(ProtocolModel):
    name: Annotated[str, Field(min_length=1)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ChatCompletionFunctionTool(ProtocolModel):
    type: Literal["function"] = "function"
    function: Function


class Custom(ProtocolModel):
    """format: what the text looks like that the tool takes."""

    name: Annotated[str, Field(min_length=1)]
    description: str | None = None
    format: dict[str, Any] | None = None


class ChatCompletionCustomTool(ProtocolModel):
    type: Literal["custom"]
    custom: Custom


def _kind(tool: Any) -> str:
    kind = tool.get("type") if isinstance(tool, dict) else getattr(tool, "type", None)
    return "custom" if kind == "custom" else "function"


Tool = Annotated[
    Annotated[ChatCompletionFunctionTool, Tag("function")]
    | Annotated[ChatCompletionCustomTool, Tag("custom")],
    Discriminator(_kind),
]


class AllowedTools(ProtocolModel):
    """tools: by name, or whole, where the request has no others."""

    mode: Literal["auto", "required"] = "auto"
    tools: list[Tool]


class AllowedChoice(ProtocolModel):
    """Some of the tools."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


Choice = (
    Literal["auto", "none", "required"]
    | AllowedChoice
    | ChatCompletionCustomTool
    | ChatCompletionFunctionTool
)


class ChatCompletionRequest(SamplingFields, FormFields):
    """OpenAI's request with LMDeploy's extensions.

    messages: a text is continued as it is, without the chat template. input_ids: a prompt in tokens, in the
    place of messages. mm_processor_kwargs, media_io_kwargs: options of all images and videos,
    as {"image": {...}, "video": {...}}.
    """

    model: str = ""
    messages: str | list[dict[str, Any]] = Field(default_factory=list)
    max_completion_tokens: Length | None = None
    n: Annotated[int, Field(ge=1, le=128)] = 1
    stream: bool = False
    stream_options: StreamOptions | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: list[Tool] | None = None
    tool_choice: Choice | None = None
    parallel_tool_calls: bool = True
    reasoning_effort: str | None = None

    do_preprocess: bool = True
    chat_template_kwargs: dict[str, Any] | None = None
    mm_processor_kwargs: dict[str, Any] | None = None
    media_io_kwargs: dict[str, Any] | None = None
    enable_thinking: bool | None = None
    input_ids: list[int] | None = None
    session_id: int | str | None = None
    cache_salt: CacheSalt | None = None
    return_token_ids: bool = False
    return_logprob: bool = False

    user: Any = None  # about the client's own bookkeeping; nothing follows from them here
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: Any = None
    prediction: Any = None  # may be used to answer sooner; it never changes an answer
    verbosity: str | None = None  # a hint to models that were trained for it; templates know none
    modalities: list[Literal["text"]] | None = None
