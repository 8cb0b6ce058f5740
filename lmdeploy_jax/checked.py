"""Dataclasses whose fields are checked by their annotations, when they are made and whenever one is set."""

from __future__ import annotations

import difflib
import reprlib
import types
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, fields
from functools import cache
from math import inf
from numbers import Integral, Real  # numpy's numbers too
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from lmdeploy_jax.errors import ConfigError

_LONGEST = 200  # characters of a value in an error


@dataclass(frozen=True)
class Rule:
    """What an annotation asks for: `text` completes "it must be …"."""

    text: str
    holds: Callable[[Any], bool]

    def __and__(self, more: Rule) -> Rule:
        return Rule(f"{self.text} {more.text}", lambda value: self.holds(value) and more.holds(value))


def at_least(low: float) -> Rule:
    return Rule(f">= {low}", lambda value: value >= low)


def within(low: float, high: float) -> Rule:
    return Rule(f"in [{low}, {high}]", lambda value: low <= value <= high)


POSITIVE = Rule("> 0", lambda value: 0 < value < inf)
NOT_EMPTY = Rule("that is not empty", bool)


_BRIEF = reprlib.Repr()
_BRIEF.maxlist = _BRIEF.maxtuple = _BRIEF.maxdict = 50
_BRIEF.maxstring = _BRIEF.maxother = _LONGEST


def _told(value: object) -> str:
    told = _BRIEF.repr(value)  # which does not look at the whole of a text of megabytes
    return told if len(told) <= _LONGEST else f"{told[:_LONGEST]}…"


class Checked:
    """Base of such dataclasses. `Annotated[int, at_least(1)] | None` is a field's type and rule at once.

    Setting a field raises ConfigError for a value that does not fit, AttributeError for a name that is no
    field.
    """

    def __setattr__(self, name: str, value: object) -> None:
        kind: Any = type(self)
        rule = _rules(kind).get(name)
        if rule is None:
            raise AttributeError(f"{type(self).__name__} has no field {name!r}.{self._suggestion(name)}")
        if not rule.holds(value):
            raise ConfigError(
                f"{type(self).__name__}.{name}={_told(value)} is invalid: it must be {rule.text}."
            )
        object.__setattr__(self, name, value)

    def _suggestion(self, name: str) -> str:
        kind: Any = type(self)
        close = difflib.get_close_matches(name, _rules(kind), n=1)
        return f" Did you mean {close[0]!r}?" if close else ""


@cache
def _rules(kind: Any) -> dict[str, Rule]:
    hints = get_type_hints(kind, include_extras=True)
    return {field.name: _rule(hints[field.name]) for field in fields(kind)}


_SIMPLE = {
    Any: Rule("anything", lambda value: True),
    types.NoneType: Rule("None", lambda value: value is None),
    bool: Rule("True or False", lambda value: isinstance(value, bool)),
    int: Rule("an integer", lambda value: isinstance(value, Integral) and not isinstance(value, bool)),
    float: Rule("a number", lambda value: isinstance(value, Real) and not isinstance(value, bool)),
    str: Rule("a text", lambda value: isinstance(value, str)),
}


def _rule(hint: Any) -> Rule:
    """The rule of a type. Raises TypeError for one that nothing here knows how to check."""
    if hint in _SIMPLE:
        return _SIMPLE[hint]
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        rule = _rule(args[0])
        for more in args[1:]:
            rule = rule & more
        return rule
    if origin is Literal:
        return Rule(f"one of {', '.join(map(str, args))}", lambda value: _is_one_of(value, args))
    if origin in (Union, types.UnionType):
        return _any_of([_rule(arg) for arg in sorted(args, key=lambda arg: arg is not types.NoneType)])
    if origin is dict:
        return _mapping(*map(_rule, args))
    if origin is Sequence:
        return _list(_rule(args[0]))
    if origin is Callable:
        return Rule("a callable", callable)
    if isinstance(origin or hint, type):
        kind = origin or hint
        return Rule(f"a {kind.__name__}", lambda value: isinstance(value, kind))
    raise TypeError(f"{hint} is a type that Checked does not know.")


def _is_one_of(value: object, allowed: Sequence[object]) -> bool:
    return any(type(value) is type(one) and value == one for one in allowed)


def _any_of(rules: Sequence[Rule]) -> Rule:
    return Rule(
        " or ".join(rule.text for rule in rules), lambda value: any(rule.holds(value) for rule in rules)
    )


def _mapping(key: Rule, value: Rule) -> Rule:
    def holds(given: object) -> bool:
        return isinstance(given, Mapping) and all(
            key.holds(name) and value.holds(item) for name, item in given.items()
        )

    return Rule(f"a dict in which every key is {key.text} and every value {value.text}", holds)


def _list(item: Rule) -> Rule:
    def holds(given: object) -> bool:
        if isinstance(given, str | bytes) or not isinstance(given, Sequence | Set):
            return False
        return all(item.holds(one) for one in given)

    return Rule(f"a list in which every item is {item.text}", holds)
