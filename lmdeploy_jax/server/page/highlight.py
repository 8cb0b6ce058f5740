"""Code in colours, for as long as that takes hardly any time.

Some of Pygments' expressions take minutes for a few thousand characters that nobody would write; a timer's
signal ends them, so that this works in a main thread alone: that of the process that `renderer` starts.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from functools import cache
from types import FrameType

from markdown_it.common.utils import escapeHtml
from pygments.lexer import Lexer
from pygments.lexers import LEXERS, get_lexer_by_name
from pygments.token import STANDARD_TYPES, _TokenType

MOST_SECONDS = 0.25  # of the processor's time, for all blocks of one answer
_AGAIN = 0.02  # seconds: an exception within a callback of the garbage collector is lost


class _OutOfTime(Exception):
    pass


class Highlighter:
    """Highlights the blocks of one answer until its time is over; what comes after stays plain."""

    def __init__(self) -> None:
        self._left = MOST_SECONDS
        self._lexing = False

    def highlight(self, code: str, language: str) -> str:
        """The code as HTML: spans with Pygments' short class names, which a style sheet colours."""
        parts = [(0, "")]  # where each ends in the code, and its HTML: both, or neither, when time is over
        if self._left > 0 and language.lower() in _languages():
            try:
                for start, kind, text in self._tokens(_lexer(language.lower()), code):
                    parts.append((start + len(text), _span(_class(kind), text)))
            except _OutOfTime:
                self._left = 0
        return "".join(part for _, part in parts) + escapeHtml(code[parts[-1][0] :])

    def _tokens(self, lexer: Lexer, code: str) -> Iterator[tuple[int, _TokenType, str]]:
        """Raises `_OutOfTime`."""
        self._lexing = True
        signal.signal(signal.SIGPROF, self._stop)
        signal.setitimer(signal.ITIMER_PROF, self._left, _AGAIN)
        try:
            yield from lexer.get_tokens_unprocessed(code)
        finally:
            self._lexing = False
            self._left = signal.setitimer(signal.ITIMER_PROF, 0)[0]

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self._lexing:
            raise _OutOfTime


def _span(name: str, text: str) -> str:
    return f'<span class="{name}">{escapeHtml(text)}</span>' if name else escapeHtml(text)


@cache
def _class(kind: _TokenType) -> str:
    """The class of the nearest kind of token that has one."""
    while kind not in STANDARD_TYPES:
        kind = kind.parent
    return STANDARD_TYPES[kind]


@cache
def _languages() -> frozenset[str]:
    """Names by which Pygments itself knows a language: for others it would look for plugins."""
    return frozenset(alias for _, _, aliases, _, _ in LEXERS.values() for alias in aliases)


@cache
def _lexer(language: str) -> Lexer:
    return get_lexer_by_name(language)
