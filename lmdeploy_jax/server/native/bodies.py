"""LMDeploy's own routes."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from lmdeploy_jax.server.bodies import ProtocolModel, SamplingFields


class GenerateRequest(SamplingFields):
    """POST /generate. Give either prompt, a text, or input_ids."""

    prompt: str | None = None
    input_ids: list[int] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = 128
    return_logprob: bool = False
    stream: bool = False
    session_id: int | None = None


class PerplexityRequest(ProtocolModel):
    """POST /get_ppl: a text, or its tokens."""

    input: str | list[int]
