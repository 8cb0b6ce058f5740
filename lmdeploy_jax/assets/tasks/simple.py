"""The tasks of a single question and answer, by name."""

from __future__ import annotations

from .facts import capitals, colours, days, months
from .skills import add, counting, extract_json, multiply, repeat, reverse, spell, subtract, units
from .smalltalk import greeting, other
from .turns import Generator

SIMPLE: dict[str, Generator] = {
    "add": add, "subtract": subtract, "multiply": multiply, "reverse": reverse, "spell": spell, "days": days,
    "months": months, "colours": colours, "capitals": capitals, "units": units, "count": counting,
    "repeat": repeat, "json": extract_json, "greeting": greeting, "other": other,
}  # fmt: skip
