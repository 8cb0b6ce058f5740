"""Pieces of Lark grammars, as llguidance reads them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable

from lmdeploy_jax.text.tokenizer import Tokenizer

ANY = "/(?s:.*)/"


def literal(text: str) -> str:
    """The text as a grammar's string. Of what JSON leaves as it is, Lark's lexer refuses DEL alone."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", r"\u007f")


def optional_literal(text: str) -> str:
    return literal(text) if text else ""


def without(body: str, *texts: str) -> str:
    """A terminal's expression: `body` where none of the texts occurs in it."""
    union = "|".join(escaped(text) for text in texts)
    return f"{body} & ~/(?s:.*)({union})(?s:.*)/" if texts else body


def escaped(text: str) -> str:
    """The text inside of a `/regular expression/`."""
    return re.escape(text).replace("/", r"\/").replace("\\\n", r"\n")


class Writer:
    """Collects the rules of a grammar. A tag is a special token where the vocabulary has it as one."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._rules: list[str] = []

    def special(self, tag: str) -> int | None:
        """The id of a tag that no text can spell."""
        token = self._tokenizer.token_to_id(tag)
        return token if token is not None and self._tokenizer.is_special(token) else None

    def tag(self, tag: str) -> str:
        token = self.special(tag)
        return literal(tag) if token is None else f"<[{token}]>"

    def until(self, body: str, tag: str, before: str = "", after: str = "") -> str:
        """Text of the form `body`, up to and with the first `tag`; `before` and `after` stand around it."""
        if self.special(tag) is None:
            return self.rule(f"({without(body, tag)}) {literal(before + tag + after)}", "TEXT")
        return f"{self.rule(without(body, tag), 'TEXT')} {self.tag(tag)} {optional_literal(after)}"

    def up_to(self, body: str, tag: str, before: str, after: str) -> str:
        """Text of the form `body`, in which the tag never occurs, then the tag with what stands around it."""
        if self.special(tag) is None:
            return self.rule(f"({body}) {literal(before + tag + after)}", "TEXT")
        text = self.rule(f"({body}) {optional_literal(before)}", "TEXT")
        return f"{text} {self.tag(tag)} {optional_literal(after)}"

    def closing(self, tag: str, before: str, after: str) -> str:
        """The tag with what stands around it."""
        if self.special(tag) is None:
            return literal(before + tag + after)
        return " ".join([optional_literal(before), self.tag(tag), optional_literal(after)])

    def rule(self, body: str, prefix: str = "rule") -> str:
        """A new rule's name; a terminal's where the prefix is in capitals."""
        name = f"{prefix}_{len(self._rules)}"
        self._rules.append(f"{name}: {body}")
        return name

    def any_of(self, bodies: Iterable[str]) -> str:
        return self.rule(" | ".join(self.rule(body) for body in bodies))

    def grammar(self, start: str) -> str:
        return "\n".join([f"start: {start}", *self._rules])
