r"""Formulas in TeX's delimiters. Markdown by itself would take the backslashes out of \(x_1\)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.common.utils import escapeHtml
from markdown_it.renderer import RendererProtocol
from markdown_it.ruler import RuleOptionsType
from markdown_it.rules_block import StateBlock
from markdown_it.rules_inline import StateInline
from markdown_it.token import Token

from lmdeploy_jax.server.page.mathml import mathml

_CLOSED_BY = {r"\(": r"\)", r"\[": r"\]", "$$": "$$", "$": "$"}


def add_formulas(markdown: MarkdownIt) -> None:
    """Rules for what stands in TeX's delimiters: MathML, or where that cannot be an element of class "math"
    with the text as it is.
    """
    interrupted: RuleOptionsType = {"alt": ["paragraph", "reference", "blockquote", "list"]}
    markdown.block.ruler.before("fence", "formula", _block, interrupted)
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


def _block(state: StateBlock, start: int, end: int, silent: bool) -> bool:
    """Lines that begin and end with the delimiters. Within them nothing is a list, a heading or a table."""
    opened = next((mark for mark in ("$$", r"\[") if _line(state, start).startswith(mark)), None)
    last = None if opened is None or state.is_code_block(start) else _last_line(state, start, end, opened)
    if last is None:
        return False
    if not silent:
        token = state.push("formula", "", 0)
        token.block, token.map = True, [start, last + 1]
        token.content = state.getLines(start, last + 1, state.sCount[start], False).strip()
        state.line = last + 1
    return True


def _line(state: StateBlock, number: int) -> str:
    return state.src[state.bMarks[number] + state.tShift[number] : state.eMarks[number]].rstrip()


def _last_line(state: StateBlock, start: int, end: int, opened: str) -> int | None:
    """The line that ends with the closing mark and has no other; None where a blank line comes first, as in
    TeX, or where something stands behind the mark.
    """
    closing = _CLOSED_BY[opened]
    for number in range(start, end):
        line = _line(state, number).removeprefix(opened if number == start else "")
        if state.isEmpty(number) or state.sCount[number] < state.blkIndent:
            return None
        if closing in line:
            return number if line.index(closing) == len(line) - len(closing) else None
    return None


def _rendered(self: RendererProtocol, tokens: Sequence[Token], idx: int, options: Any, env: Any) -> str:
    token, source = tokens[idx], tokens[idx].content
    opened = next(mark for mark in _CLOSED_BY if source.startswith(mark))
    alone = opened in ("$$", r"\[")
    found = mathml(source.removeprefix(opened).removesuffix(_CLOSED_BY[opened]).strip(), block=alone)
    shown = found or f'<span class="math">{escapeHtml(source)}</span>'
    if token.block:
        return f'<div class="formula" tabindex="0">{shown}</div>\n'
    return f'<span class="formula" tabindex="0">{shown}</span>' if alone and found else shown
