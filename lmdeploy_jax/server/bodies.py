"""What the requests of several protocols share."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, GetCoreSchemaHandler, model_validator

from lmdeploy_jax.text.conversation import without_nulls

Count = Annotated[int, Field(ge=0)]
Length = (
    Annotated[int, Field(ge=1)] | Literal[-1]
)  # in tokens; -1 is as far as the context goes, as in llama.cpp
TopK = Annotated[int, Field(ge=-1)]  # 0 switches it off, and so does vLLM's and transformers' -1
TopP = Annotated[float, Field(ge=0, le=1)]
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
    top_p: TopP | None = None
    top_k: TopK | None = None
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
    max_tokens: Length | None = None
    min_new_tokens: Count | None = None
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False

    def sampling(self) -> dict[str, Any]:
        """As fields of a GenerationConfig, None for what is left open."""
        same = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty",
                "repetition_penalty", "repetition_ngram_size", "repetition_ngram_threshold", "stop_token_ids",
                "bad_words", "min_new_tokens", "ignore_eos", "skip_special_tokens",
                "spaces_between_special_tokens", "include_stop_str_in_output")  # fmt: skip
        return {name: getattr(self, name) for name in same} | {
            "top_k": width(self.top_k),
            "max_new_tokens": length(self.max_tokens),
            "random_seed": None if self.seed is None else self.seed & 0xFFFFFFFF,
            "stop_words": [self.stop] if isinstance(self.stop, str) else self.stop,
            "logit_bias": _clamped(self.logit_bias),
        }


def length(tokens: int | None) -> int | None:
    """None for as many as there is room for."""
    return None if tokens == -1 else tokens


def width(top_k: int | None) -> int | None:
    """0 for no limit, None for what is left open."""
    return None if top_k is None else max(0, top_k)


def _clamped(bias: dict[int, float] | None) -> dict[int, float] | None:
    if bias is None:
        return None
    return {token: max(-MAX_BIAS, min(MAX_BIAS, value)) for token, value in bias.items()}
