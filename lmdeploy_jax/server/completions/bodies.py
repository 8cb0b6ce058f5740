"""POST /v1/completions."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from lmdeploy_jax.server.bodies import CacheSalt, Length, SamplingFields, StreamOptions
from lmdeploy_jax.server.forms import FormFields

Ids = list[int]


class CompletionRequest(SamplingFields, FormFields):
    """OpenAI's request with LMDeploy's extensions. Without max_tokens an answer may fill the context.

    prompt: one text, one prompt in tokens, or a list of either. max_tokens: 0, with `echo`, only tells about
    the prompt. logprobs: so many alternatives a token.
    """

    model: str = ""
    prompt: str | Ids | list[str] | list[Ids]
    max_tokens: Length | Literal[0] | None = None
    max_completion_tokens: Length | Literal[0] | None = None
    n: Annotated[int, Field(ge=1, le=128)] = 1
    best_of: int | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool = False
    suffix: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    session_id: int | str | None = None
    cache_salt: CacheSalt | None = None
    user: Any = None

    @property
    def length(self) -> int | None:
        """Most tokens of an answer."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
