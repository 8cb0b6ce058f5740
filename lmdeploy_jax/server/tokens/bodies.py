"""POST /v1/encode, /tokenize and /detokenize."""

from __future__ import annotations

from typing import Any

from lmdeploy_jax.server.bodies import ProtocolModel


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
