"""What a grammar may consist of. Looked at before anything is compiled, so that a refusal costs nothing.

What a grammar within these limits costs nevertheless is found by trying (see `trial`).
"""

from __future__ import annotations

import re

from lmdeploy_jax.errors import RequestError

SOURCE = 512 * 1024  # bytes of a schema, an expression, a list of choices or a grammar; of all tools together
NESTING = 256  # schemas within schemas
DEFINITIONS = 1000  # of a schema, and places that its references name
PROPERTIES = 5000  # of a schema, all of its objects together
OPTIONAL = 1000  # properties of one object that may be left out
CHOICES = 20_000  # enum, anyOf and oneOf of a schema together; texts of a choice
MULTIPLE_OF = 20_000  # its digits without point and trailing zeros: 0.25 counts as 25
RULES = 1000  # of a Lark or GBNF grammar
TOOLS = 512

_RULE = re.compile(r"^\s*[?!]?[A-Za-z_][\w.\-]*(?:\[[^\]]*\])?\s*:", re.MULTILINE)


def check(what: str, value: int, limit: int, name: str) -> None:
    """Raises `RequestError` where the value is above the limit."""
    if value > limit:
        raise RequestError(f"{name}: {what} of {value} is above the limit of {limit}. Use a simpler form.")


def check_source(text: str, name: str) -> str:
    """The text itself. Raises `RequestError` where it is too long, or cannot be written as UTF-8."""
    try:
        check("size in bytes", len(text.encode()), SOURCE, name)
    except UnicodeEncodeError as error:
        raise RequestError(f"{name} is no valid text: {error}") from error
    return text


def check_regex(pattern: str, name: str) -> None:
    """Raises `RequestError` for what llguidance would change without a word: it drops a `\\` at the end."""
    if (len(pattern) - len(pattern.rstrip("\\"))) % 2:
        raise RequestError(f"{name} ends with a lone backslash; write \\\\ for the character.")


def check_rules(text: str, name: str) -> None:
    """The number of rules and terminals, which bounds how long a chain of them can be."""
    check("number of rules", len(_RULE.findall(text)), RULES, name)
