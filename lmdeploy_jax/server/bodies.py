"""What the requests of several protocols share."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, GetCoreSchemaHandler, model_validator

from lmdeploy_jax.text.conversation import without_nulls

Count = Annotated[int, Field(ge=0)]
CacheSalt = Annotated[str, Field(min_length=1)]  # cached prompts are shared only under the same one
MAX_BIAS = 100.0
_LARGE, _SHOWN = 1000, 50


def _fail_fast(schema: Any) -> None:
    if isinstance(schema, dict):
        if schema.get("type") == "list":
            schema["fail_fast"] = True
        for part in schema.values():
            _fail_fast(part)
    elif isinstance(schema, list | tuple):
        for part in schema:
            _fail_fast(part)


class ProtocolModel(BaseModel):
    """A request's body, or an object within. Fields that it does not have are kept in `model_extra`, see
    `routing.check_fields`. A field that is null is as good as absent: typed clients send all that they know.
    """

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> Any:
        """A list's check ends with its first fault: an error object for each of a million items takes half a
        minute and gigabytes.
        """
        schema = handler(source)
        _fail_fast(schema)
        return schema

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: Any) -> Any:
        return without_nulls(given) if isinstance(given, dict) else given


def _quickly_checked(bias: Any) -> Any:
    """The first fault of a large object ends its check, as with lists."""
    if isinstance(bias, dict) and len(bias) > _LARGE:
        for token, value in bias.items():
            if not (token.lstrip("-").isdecimal() and isinstance(value, int | float)):
                raise ValueError(f"{token[:_SHOWN]!r} must be a token's id, and have a number")
    return bias


class StreamOptions(ProtocolModel):
    """include_usage: a last chunk tells the tokens of the whole request."""

    include_usage: bool = False


class SamplingFields(ProtocolModel):
    """Sampling parameters: OpenAI's, and LMDeploy's under its own names. None leaves the default.

    spaces_between_special_tokens: fast tokenizers put none, whatever it says; taken since clients send it.
    """

    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Count | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    repetition_ngram_size: Count = 0
    repetition_ngram_threshold: Count = 0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    logit_bias: Annotated[dict[int, float], BeforeValidator(_quickly_checked)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    min_new_tokens: Count | None = None
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False

    def sampling(self) -> dict[str, Any]:
        """As fields of a GenerationConfig, None for what is left open."""
        same = ("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty",
                "repetition_penalty", "repetition_ngram_size", "repetition_ngram_threshold", "stop_token_ids",
                "bad_words", "min_new_tokens", "ignore_eos", "skip_special_tokens",
                "spaces_between_special_tokens", "include_stop_str_in_output")  # fmt: skip
        return {name: getattr(self, name) for name in same} | {
            "max_new_tokens": self.max_tokens,
            "random_seed": None if self.seed is None else self.seed & 0xFFFFFFFF,
            "stop_words": [self.stop] if isinstance(self.stop, str) else self.stop,
            "logit_bias": _clamped(self.logit_bias),
        }


def _clamped(bias: dict[int, float] | None) -> dict[int, float] | None:
    if bias is None:
        return None
    return {token: max(-MAX_BIAS, min(MAX_BIAS, value)) for token, value in bias.items()}


class JsonSchema(ProtocolModel):
    """A named JSON schema. It is enforced, `strict` or not."""

    name: str = "answer"
    description: str | None = None
    json_schema: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(ProtocolModel):
    """The form that an answer is held to; see docs/structured_output.md."""

    type: Literal["text", "json_object", "json_schema", "regex_schema", "regex", "choice", "grammar"]
    json_schema: JsonSchema | None = None
    regex_schema: str | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None

    def as_dict(self) -> dict[str, Any] | None:
        """As `GenerationConfig.response_format` has it."""
        return None if self.type == "text" else self.model_dump(by_alias=True, exclude_none=True)
