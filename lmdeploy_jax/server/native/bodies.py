"""LMDeploy's own routes."""

from __future__ import annotations

from lmdeploy_jax.server.bodies import Length, ProtocolModel, SamplingFields
from lmdeploy_jax.server.forms import FormFields


class GenerateRequest(SamplingFields, FormFields):
    """POST /generate. Give either prompt, a text, or input_ids."""

    prompt: str | None = None
    input_ids: list[int] | None = None
    max_tokens: Length | None = 128
    return_logprob: bool = False
    return_routed_experts: bool = False
    stream: bool = False
    session_id: int | str | None = None


class PerplexityRequest(ProtocolModel):
    """POST /get_ppl: a text, or its tokens."""

    input: str | list[int]
