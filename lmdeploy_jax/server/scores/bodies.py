"""POST /v1/rerank, /v1/score and /v1/classify."""

from __future__ import annotations

from typing import Annotated

from pydantic import AliasChoices, BaseModel, Field

from lmdeploy_jax.server.bodies import ProtocolModel

Text = Annotated[str, Field(min_length=1)]
Tokens = Annotated[list[int], Field(min_length=1)]
Texts = Text | Annotated[list[Text], Field(min_length=1)]


class Document(BaseModel):
    """A document as an object."""

    text: Text


class PairRequest(ProtocolModel):
    """instruction: what makes a document a good answer, for models that are told."""

    model: str = ""
    instruction: str | None = None
    user: str | None = None  # about the client's own bookkeeping


class RerankRequest(PairRequest):
    """top_n: how many of the best are told; 0 and null are all of them."""

    query: Text
    documents: Annotated[list[Text | Document], Field(min_length=1)]
    top_n: Annotated[int, Field(ge=0)] | None = None
    return_documents: bool = True

    def texts(self) -> list[str]:
        """The documents' texts."""
        return [each if isinstance(each, str) else each.text for each in self.documents]


class ScoreRequest(PairRequest):
    """One text with one or several others, or two lists of the same length."""

    queries: Texts = Field(validation_alias=AliasChoices("queries", "text_1", "data_1"))
    documents: Texts = Field(validation_alias=AliasChoices("documents", "text_2", "items", "data_2"))

    def pairs(self) -> list[tuple[str, str]]:
        """What is compared. Raises ValueError for lists of other lengths."""
        queries = [self.queries] if isinstance(self.queries, str) else self.queries
        documents = [self.documents] if isinstance(self.documents, str) else self.documents
        if len(queries) == 1:
            queries = queries * len(documents)
        return list(zip(queries, documents, strict=True))


class ClassifyRequest(ProtocolModel):
    """A text or its tokens, or a list of either."""

    model: str = ""
    input: Text | Tokens | Annotated[list[Text] | list[Tokens], Field(min_length=1)]
    user: str | None = None

    def inputs(self) -> list[str | list[int]]:
        """All inputs as a list."""
        given = self.input
        return [given] if isinstance(given, str) or isinstance(given[0], int) else list(given)  # type: ignore
