"""Text -> JSON by the types that a tool's JSON schema allows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NoReturn

ALL_TYPES = frozenset({"string", "number", "integer", "boolean", "null", "array", "object"})
_BRANCHES = ("allOf", "anyOf", "oneOf")
_PYTHON_WORDS = {"True": "true", "False": "false", "None": "null"}


def value_types(parameters: Mapping[str, Any], key: str) -> frozenset[str]:
    """The JSON types of one parameter: all where its own schema doesn't say, text where it has no schema."""
    waiting = _declared(parameters, key)
    if not waiting:
        return frozenset({"string"})
    types: set[str] = set()
    followed: set[str] = set()  # references, which may go in circles
    while waiting:
        match waiting.pop():
            case {"$ref": str(reference)}:
                waiting += [] if reference in followed else [resolve(reference, parameters)]
                followed.add(reference)
            case {"type": str(name)}:
                types.add(name)
            case {"type": [*names]} if names:
                types |= {str(name) for name in names}
            case {"enum": [*values]} if values:
                types = types.union(*map(_types_of, values))
            case {"const": value}:
                types |= _types_of(value)
            case {"anyOf": [*branches]} | {"oneOf": [*branches]} | {"allOf": [*branches]} if branches:
                waiting += branches
            case _:
                return ALL_TYPES
    return frozenset(types) or ALL_TYPES


def _declared(parameters: Mapping[str, Any], key: str) -> list[Any]:
    """The schemas that the parameters' schema has for the key."""
    found: list[Any] = []
    waiting: list[Any] = [parameters]
    followed: set[str] = set()
    while waiting:
        schema = waiting.pop()
        if not isinstance(schema, Mapping):
            continue
        properties, others = schema.get("properties"), schema.get("additionalProperties")
        if isinstance(properties, Mapping) and key in properties:
            found.append(properties[key])
        elif isinstance(others, Mapping):
            found.append(others)
        reference = schema.get("$ref")
        if isinstance(reference, str) and reference not in followed:
            followed.add(reference)
            waiting.append(resolve(reference, parameters))
        waiting += [branch for word in _BRANCHES for branch in _listed(schema.get(word))]
    return found


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def resolve(reference: str, root: Mapping[str, Any]) -> Any:
    """What a local reference such as `#/$defs/Point` points to; None for any other."""
    found: Any = root
    for step in reference.removeprefix("#/").split("/"):
        found = found.get(step) if isinstance(found, Mapping) else None
    return found


def coerce(text: str, types: frozenset[str]) -> str:
    """The value's JSON text: the model's own if it has one of the types, else the text as a JSON string.

    Python's True, False and None are understood; a whole float such as 3.0 serves as an integer.
    """
    own = text.strip()
    own = _PYTHON_WORDS.get(own, own)
    try:
        value = json.loads(own, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return json.dumps(text, ensure_ascii=False)
    if not _types_of(value) & types:
        return json.dumps(text, ensure_ascii=False)
    return str(int(value)) if isinstance(value, float) and not types & {"number"} else own


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _types_of(value: Any) -> frozenset[str]:
    match value:
        case None:
            return frozenset({"null"})
        case bool():
            return frozenset({"boolean"})
        case int():
            return frozenset({"integer", "number"})
        case float():
            return frozenset({"integer", "number"} if value.is_integer() else {"number"})
        case str():
            return frozenset({"string"})
        case list():
            return frozenset({"array"})
    return frozenset({"object"})
