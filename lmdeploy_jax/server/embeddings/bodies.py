"""POST /v1/embeddings and /pooling."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from lmdeploy_jax.server.bodies import ProtocolModel

Text = Annotated[str, Field(min_length=1)]
Tokens = Annotated[list[int], Field(min_length=1)]
Batch = Annotated[list[Text] | list[Tokens], Field(min_length=1)]


class PoolingRequest(ProtocolModel):
    """A text or its tokens, or a list of either.

    pooling: the hidden state of the last token, or the mean over all. dimensions: keep only the first ones.
    """

    model: str = ""
    input: Text | Tokens | Batch
    pooling: Literal["last", "mean"] = "last"
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Field(ge=1)] | None = None

    user: Any = None  # about the client's own bookkeeping

    def inputs(self) -> list[str | list[int]]:
        """All inputs as a list."""
        value: Any = self.input
        return [value] if isinstance(value, str) or isinstance(value[0], int) else list(value)


class EmbeddingsRequest(PoolingRequest):
    """normalize: scale every embedding to length 1, as OpenAI's are."""

    normalize: bool = True
