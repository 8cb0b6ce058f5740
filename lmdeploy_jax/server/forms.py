"""The form that an answer is held to, by every name under which clients ask for one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field

from lmdeploy_jax.server.bodies import ProtocolModel
from lmdeploy_jax.server.errors import ApiError

Form = dict[str, Any]  # as `GenerationConfig.response_format` has it


class JsonSchema(ProtocolModel):
    """A named JSON schema. It is enforced, `strict` or not."""

    name: str = "answer"
    description: str | None = None
    json_schema: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(ProtocolModel):
    """The form that an answer is held to; see docs/structured_output.md. `schema`, of a JSON object, is
    llama.cpp's place for one; others put it there too.
    """

    type: Literal["text", "json_object", "json_schema", "regex_schema", "regex", "choice", "grammar"]
    json_schema: JsonSchema | None = None
    own_schema: dict[str, Any] | None = Field(default=None, alias="schema")
    regex_schema: str | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None

    def as_dict(self) -> Form | None:
        """As `GenerationConfig.response_format` has it."""
        if self.own_schema is not None and self.json_schema is None and self.type.startswith("json"):
            return schema_form(self.own_schema, "response_format.schema")
        return None if self.type == "text" else self.model_dump(by_alias=True, exclude_none=True)


class StructuredOutputs(ProtocolModel):
    """vLLM's object, of which one field is given."""

    json_schema: dict[str, Any] | str | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool = False

    def forms(self, prefix: str) -> Iterator[tuple[str, Form]]:
        """Each form that is asked for, by its field's name. Raises `ApiError` for an unknown field."""
        unknown = next((name for name, value in (self.model_extra or {}).items() if value), None)
        if unknown is not None:
            raise ApiError(
                400,
                f"{prefix}{unknown} is not supported: give one of json, regex, choice, grammar, json_object.",
                param=f"{prefix}{unknown}",
                code="unsupported_field",
            )
        if self.json_schema is not None:
            place = f"{prefix}json"
            yield place, schema_form(_object(self.json_schema, place), place)
        for kind in ("regex", "choice", "grammar"):
            if (value := getattr(self, kind)) is not None:
                yield prefix + kind, {"type": kind, kind: value, "field": prefix + kind}
        if self.json_object:
            yield f"{prefix}json_object", {"type": "json_object"}


class FormFields(ProtocolModel):
    """OpenAI's field, vLLM's (`structured_outputs`, and the older `guided_*`) and llama.cpp's (`json_schema`,
    `grammar`).
    """

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    guided_json_object: bool = False
    json_schema: dict[str, Any] | None = None
    grammar: str | None = None

    def form(self) -> Form | None:
        """The form that is asked for. Raises `ApiError` for two, and for what cannot be one."""
        given = dict(self._forms())
        if len(given) > 1:
            first, second, *_ = given
            message = f"{second}: {first} asks for a form already; give one of them."
            raise ApiError(400, message, param=second, code="invalid_value")
        return next(iter(given.values()), None)

    def _forms(self) -> Iterator[tuple[str, Form]]:
        if self.response_format is not None and (own := self.response_format.as_dict()) is not None:
            yield "response_format", own
        if self.structured_outputs is not None:
            yield from self.structured_outputs.forms("structured_outputs.")
        kinds = ("json", "regex", "choice", "grammar", "json_object")
        yield from StructuredOutputs(**{kind: getattr(self, f"guided_{kind}") for kind in kinds}).forms(
            "guided_"
        )
        if self.json_schema is not None:
            yield "json_schema", schema_form(self.json_schema, "json_schema")
        if self.grammar:
            yield "grammar", {"type": "grammar", "grammar": self.grammar, "field": "grammar"}


def schema_form(schema: dict[str, Any], field: str) -> Form:
    """The form of JSON that fits a schema. field: where the request has it."""
    named = {"name": "answer", "schema": schema}
    return {"type": "json_schema", "json_schema": named, "field": field}


def _object(schema: dict[str, Any] | str, name: str) -> dict[str, Any]:
    """A schema, perhaps as its text. Raises `ApiError`."""
    try:
        read = json.loads(schema) if isinstance(schema, str) else schema
    except (ValueError, RecursionError):
        read = None
    if not isinstance(read, dict):
        raise ApiError(400, f"{name} is no JSON schema: give an object.", param=name, code="invalid_value")
    return read
