r"""Formulas stay as TeX: Markdown would take the backslashes out of \(x_1\), and some underscores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.common.utils import escapeHtml
from markdown_it.renderer import RendererProtocol
from markdown_it.rules_inline import StateInline
from markdown_it.token import Token

_CLOSED_BY = {r"\(": r"\)", r"\[": r"\]", "$$": "$$", "$": "$"}


def keep_formulas(markdown: MarkdownIt) -> None:
    """A rule for what stands in TeX's delimiters: elements of class "math" with the text as it is."""
    markdown.inline.ruler.before("escape", "formula", _formula)
    markdown.add_render_rule("formula", _rendered)


def _formula(state: StateInline, silent: bool) -> bool:
    opened = next((mark for mark in _CLOSED_BY if state.src.startswith(mark, state.pos)), None)
    end = -1 if opened is None else _end(state, opened)
    if opened is None or end < 0:
        return False
    if not silent:
        token = state.push("formula", "", 0)
        token.content = state.src[state.pos : end]
    state.pos = end
    return True


def _end(state: StateInline, opened: str) -> int:
    """Where the formula that begins here ends; -1 where none begins. A dollar may be an amount: it opens
    before a character and closes behind one, and no digit follows.
    """
    closing, begin = _CLOSED_BY[opened], state.pos + len(opened)
    missing: set[str] = state.env.setdefault(f"unclosed {id(state.tokens)}", set())
    found = -1 if closing in missing else state.src.find(closing, begin)
    if found < 0:
        missing.add(closing)  # nor does any formula further on: a search for each would take quadratic time
    if found <= begin:
        return -1
    after = state.src[found + len(closing) : found + len(closing) + 1]
    inner = state.src[begin], state.src[found - 1]
    if opened == "$" and (inner[0].isspace() or inner[1].isspace() or after.isdigit()):
        return -1
    return found + len(closing)


def _rendered(self: RendererProtocol, tokens: Sequence[Token], idx: int, options: Any, env: Any) -> str:
    return f'<span class="math">{escapeHtml(tokens[idx].content)}</span>'
