"""LMDeploy's own routes."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from lmdeploy_jax.server.protocol.common import ProtocolModel, SamplingFields


class GenerateRequest(SamplingFields):
    """POST /generate. Give either prompt, a text, or input_ids."""

    prompt: str | None = None
    input_ids: list[int] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = 128
    return_logprob: bool = False
    stream: bool = False
    session_id: int | None = None


class EncodeRequest(ProtocolModel):
    """POST /v1/encode. do_preprocess: put the text into the chat template first."""

    input: str | list[str]
    do_preprocess: bool = False
    add_bos: bool = True


class TokenizeRequest(ProtocolModel):
    """POST /tokenize. Give either prompt, a text, or messages, a conversation."""

    model: str = ""
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_special_tokens: bool = True
    return_token_strs: bool = False


class DetokenizeRequest(ProtocolModel):
    """POST /detokenize."""

    model: str = ""
    tokens: list[int]
    skip_special_tokens: bool = False


class PerplexityRequest(ProtocolModel):
    """POST /get_ppl: a text, or its tokens."""

    input: str | list[int]


class AbortRequest(ProtocolModel):
    """POST /abort_request: those of a session, of the request with an id, or all."""

    session_id: int | None = None
    request_id: str | None = None
    abort_all: bool = False
