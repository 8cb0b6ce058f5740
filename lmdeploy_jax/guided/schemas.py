"""JSON schemas before they are compiled: their keywords, what they may cost, and deep ones written flat."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Any

from lmdeploy_jax.errors import RequestError
from lmdeploy_jax.guided.limits import (
    CHOICES,
    DEFINITIONS,
    MULTIPLE_OF,
    NESTING,
    OPTIONAL,
    PROPERTIES,
    check,
    check_regex,
    check_source,
)

_TYPES = ("string", "number", "integer", "boolean", "null", "array", "object")
_SCHEMA = ("items", "additionalProperties", "contains", "propertyNames", "not", "if", "then", "else")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems", "items")
_MAPPINGS = ("properties", "patternProperties", "$defs", "definitions")
_DEFINITIONS = ("$defs", "definitions")
_NAMED = ("$id", "$anchor", "$dynamicRef", "$dynamicAnchor")  # what a reference may mean depends on the place
# llguidance reads JSON of at most 128 levels; a level of a schema is up to three of JSON. What lies deeper
# becomes a definition.
_READABLE, _STEP = 100, 16

Part = tuple[Any, Any, Any, str]  # a container, the key in it, the schema that stands there, its path


def parts(schema: Any) -> Iterator[Part]:
    """The schemas directly within a schema."""
    if not isinstance(schema, dict):
        return
    for key in _SCHEMA:
        if isinstance(schema.get(key), dict):
            yield schema, key, schema[key], key
    for key in _LISTS:
        if isinstance(schema.get(key), list):
            yield from ((schema[key], i, part, f"{key}[{i}]") for i, part in enumerate(schema[key]))
    for key in _MAPPINGS:
        if isinstance(schema.get(key), dict):
            yield from ((schema[key], name, part, f"{key}.{name}") for name, part in schema[key].items())


def schema_json(schema: Any, name: str) -> Any:
    """The schema as llguidance can read it. `name` is its place in the request, for the error's text.

    Raises `RequestError` for what is no JSON, is no schema, or goes beyond a limit.
    """
    try:
        text = json.dumps(schema, allow_nan=False)
        schema = json.loads(text)
    except RecursionError as error:
        raise RequestError(f"{name} is nested far above the limit of {NESTING}.") from error
    except (TypeError, ValueError) as error:
        raise RequestError(f"{name} is not JSON: {error}") from error
    check_source(text, name)
    count = _Count(name)
    waiting = [(schema, name, 1)]
    while waiting:
        part, place, depth = waiting.pop()
        count.add(part, place, depth)
        waiting += [(inner, f"{place}.{path}", depth + 1) for _, _, inner, path in parts(part)]
    return _flat(schema) if _levels(schema) > _READABLE and not count.places_matter else schema


class _Count:
    """What the parts of one schema come to."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._totals: Counter[str] = Counter()
        self._references: set[str] = set()
        self.places_matter = False  # whether a reference means a place that must stay where it is

    def add(self, part: Any, place: str, depth: int) -> None:
        check("nesting", depth, NESTING, self._name)
        if not isinstance(part, dict):
            return
        _check_shape(part, place)
        self._add_references(part)
        self._add_total("properties", len(part.get("properties", ())), PROPERTIES)
        choices = (part.get(key) for key in ("enum", "anyOf", "oneOf"))
        self._add_total("choices", sum(len(values) for values in choices if values), CHOICES)
        check("optional properties", _optional(part), OPTIONAL, place)
        check("multipleOf", _multiple(part), MULTIPLE_OF, place)
        for pattern in (part.get("pattern", ""), *part.get("patternProperties", ())):
            check_regex(pattern, f"{place}.pattern")

    def _add_total(self, what: str, count: int, limit: int) -> None:
        self._totals[what] += count
        check(what, self._totals[what], limit, self._name)

    def _add_references(self, part: Mapping[str, Any]) -> None:
        """A chain of references is at most as long as there are places that references name."""
        self._add_total("definitions", sum(len(part.get(key, ())) for key in _DEFINITIONS), DEFINITIONS)
        reference = part.get("$ref")
        if isinstance(reference, str):
            self._references.add(reference)
            check("definitions", len(self._references), DEFINITIONS, self._name)
            steps = reference.split("/")
            self.places_matter |= reference != "#" and not (
                len(steps) == 3 and steps[0] == "#" and steps[1] in _DEFINITIONS
            )
        self.places_matter |= any(key in part for key in _NAMED)


def _check_shape(part: Mapping[str, Any], place: str) -> None:
    """The keywords that this project reads itself, or that llguidance's errors do not name."""
    for key, kind, expected in (
        *((key, dict, "an object") for key in _MAPPINGS),
        *((key, list, "a list") for key in ("enum", "required", "anyOf", "oneOf", "allOf", "prefixItems")),
        ("pattern", str, "a regular expression"),
        ("minLength", int | float, "a number"),
        ("maxLength", int | float, "a number"),
    ):
        if key in part and not isinstance(part[key], kind):
            raise RequestError(f"{place}.{key}={part[key]!r} is invalid: it must be {expected}.")
    for key in part.get("required", ()):
        if not isinstance(key, str):
            raise RequestError(f"{place}.required names {key!r}, which is no text.")
    types = part.get("type", [])
    for name in types if isinstance(types, list) else [types]:
        if name not in _TYPES:
            raise RequestError(f"{place}.type={types!r} is invalid: choose from {', '.join(_TYPES)}.")


def _optional(part: Mapping[str, Any]) -> int:
    return len(part.get("properties", {}).keys() - part.get("required", ()))


def _multiple(part: Mapping[str, Any]) -> int:
    """The number that is counted up to: 0.25 is 25, and 3000 is 3, since zeros at the end cost nothing."""
    value = part.get("multipleOf", 1)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return 0  # no number: compiling it will refuse it
    digits = Decimal(repr(value)).normalize().as_tuple().digits
    return int("".join(map(str, digits[:20])))


def _levels(value: Any) -> int:
    """How deep the JSON is nested."""
    deepest, waiting = 0, [(value, 1)]
    while waiting:
        part, depth = waiting.pop()
        deepest = max(deepest, depth)
        inner = part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
        waiting += [(each, depth + 1) for each in inner]
    return deepest


def _flat(schema: dict[str, Any]) -> dict[str, Any]:
    """The same schema, with every so many levels in a definition of its own. Changes what it is given."""
    found: dict[str, Any] = {}
    waiting = [(schema, 1)]
    while waiting:
        part, depth = waiting.pop()
        for container, key, inner, _ in parts(part):
            if depth % _STEP == 0 and isinstance(inner, dict):
                name = f"level-{depth}-{len(found)}"
                found[name] = inner
                container[key] = {"$ref": f"#/$defs/{name}"}
            waiting.append((inner, depth + 1))
    return {**schema, "$defs": {**schema.get("$defs", {}), **found}}
