"""Finds added tokens in a text, for vocabularies whose own library does not know of them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from lmdeploy_jax.text.settings import AddedToken

_WINDOW = 1 << 16  # characters that one search looks at: the interpreter's lock is held meanwhile
_SPACE, _WORD = re.compile(r"\s*"), re.compile(r"\w")


class AddedTokenCutter:
    """Cuts as `tokenizers` does: at each place the longest token, from left to right.

    tokens: id -> token.
    """

    def __init__(self, tokens: Mapping[int, AddedToken]) -> None:
        self._tokens = tokens
        self._ids = {token.content: i for i, token in tokens.items()}
        longest_first = sorted(filter(None, self._ids), key=len, reverse=True)
        # Nothing but literals: a group or a class around each makes the search a hundred times slower.
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")  # (?!) never matches
        self._longest = max(map(len, longest_first), default=1)

    def find(self, text: str) -> Iterator[tuple[int, int, int]]:
        """(start, stop, id) of each token; white space that a token swallows lies between start and stop."""
        end = place = 0
        while (match := self._next(text, place)) is not None:
            place = match.end()
            token_id = self._ids[match[0]]
            token = self._tokens[token_id]
            if token.single_word and _within_word(text, match):
                continue
            start = end + len(text[end : match.start()].rstrip()) if token.lstrip else match.start()
            if token.rstrip:
                place = _SPACE.match(text, place).end()  # type: ignore[union-attr]  # it matches anywhere
            yield start, place, token_id
            end = place

    def _next(self, text: str, place: int) -> re.Match[str] | None:
        """The first token from `place` on."""
        while place < len(text):
            found = self._pattern.search(text, place, place + _WINDOW + self._longest)
            if found is not None:
                return self._pattern.match(text, found.start())  # the window may have cut a longer one
            place += _WINDOW
        return None


def _within_word(text: str, match: re.Match[str]) -> bool:
    start, stop = match.span()
    return any(_WORD.match(char) for char in (text[stop : stop + 1], text[start - 1 : start]))
