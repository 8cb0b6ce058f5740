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
    """Collects the rules of a grammar. A tag is a special token where the vocabulary has it as one, and so is
    what within it the vocabulary has.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._rules: list[str] = []

    def special(self, tag: str) -> int | None:
        """The id of a tag that no text can spell."""
        token = self._tokenizer.token_to_id(tag)
        return token if token is not None and self._tokenizer.is_special(token) else None

    def tag(self, tag: str) -> str:
        """The tag as a part of a rule; special tokens within it are such."""
        lead, rest = self._split(tag)
        return f"{optional_literal(lead)} {rest}".strip()

    def _split(self, tag: str) -> tuple[str, str]:
        """What of a tag is text up to its first special token, and the rest as a part of a rule."""
        token = self.special(tag)
        if token is not None:
            return "", f"<[{token}]>"
        ids = self._tokenizer.encode(tag, add_bos=False, add_special_tokens=False)
        found = {self._tokenizer.decode_text([i], False): i for i in ids if self._tokenizer.is_special(i)}
        if not found:
            return tag, ""
        lead, *pieces = re.split(f"({'|'.join(map(re.escape, found))})", tag)
        return lead, " ".join(f"<[{found[p]}]>" if p in found else literal(p) for p in pieces if p)

    def until(self, body: str, tag: str, before: str = "", after: str = "") -> str:
        """Text of the form `body`, up to and with the first `tag`; `before` and `after` stand around it."""
        lead, rest = self._split(tag)
        if not rest:
            return self.rule(f"({without(body, tag)}) {literal(before + tag + after)}", "TEXT")
        if lead:  # a special token shows where it ends
            return (
                f"{self.rule(f'({body}) {literal(before + lead)}', 'TEXT')} {rest} {optional_literal(after)}"
            )
        return f"{self.rule(without(body, tag), 'TEXT')} {rest} {optional_literal(after)}"

    def up_to(self, body: str, tag: str, before: str, after: str) -> str:
        """Text of the form `body`, in which the tag never occurs, then the tag with what stands around it."""
        lead, rest = self._split(tag)
        if not rest:
            return self.rule(f"({body}) {literal(before + tag + after)}", "TEXT")
        text = self.rule(f"({body}) {optional_literal(before + lead)}", "TEXT")
        return f"{text} {rest} {optional_literal(after)}"

    def closing(self, tag: str, before: str, after: str) -> str:
        """The tag with what stands around it."""
        if not self._split(tag)[1]:
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
