"""Answers, written in Markdown by a model that nobody has reason to trust, as HTML that a page can show.

No HTML of the answer's own passes, no image is loaded, and links lead to http, https and mailto alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any
from urllib.parse import urlsplit

from markdown_it import MarkdownIt
from markdown_it.common.utils import escapeHtml
from markdown_it.renderer import RendererHTML
from markdown_it.rules_core import StateCore
from markdown_it.token import Token

from lmdeploy_jax.server.page.formulas import add_formulas
from lmdeploy_jax.server.page.highlight import Highlighter

LINKED = frozenset({"http", "https", "mailto"})


@dataclass(frozen=True)
class Rendered:
    """An answer in two parts: what more text cannot change any more, and its last block.

    settled, open: HTML. settled_lines: lines of the text that `settled` stands for. Only a link's definition
    may still change what is settled; who wants those too renders the whole text once it is complete.
    """

    settled: str
    settled_lines: int
    open: str


def render(text: str) -> Rendered:
    """The answer as HTML, in a time that grows with its length whatever is in it."""
    markdown = _markdown()
    env: dict[str, Any] = {"highlighter": Highlighter()}
    tokens = markdown.parse(text, env)
    begins = [i for i, token in enumerate(tokens) if token.level == 0 and token.nesting >= 0]
    last = begins[-1] if begins else 0
    place = tokens[last].map if begins else None
    return Rendered(
        markdown.renderer.render(tokens[:last], markdown.options, env),
        place[0] if place else 0,
        markdown.renderer.render(tokens[last:], markdown.options, env),
    )


@cache
def _markdown() -> MarkdownIt:
    """CommonMark with tables and strikethrough."""
    markdown = MarkdownIt("commonmark", {"html": False, "breaks": False}, renderer_cls=_Renderer)
    markdown.enable(["table", "strikethrough"])
    markdown.validateLink = _is_linked  # type: ignore[method-assign]
    add_formulas(markdown)
    markdown.core.ruler.push("alignment", _align_by_class)
    return markdown


def _is_linked(url: str) -> bool:
    try:
        return urlsplit(url.strip()).scheme.lower() in LINKED
    except ValueError:
        return False


def _align_by_class(state: StateCore) -> None:
    """The page's policy forbids styles within its elements."""
    for token in state.tokens:
        style = token.attrs.pop("style", None) if token.type in ("th_open", "td_open") else None
        if style is not None:
            token.attrs["class"] = f"align-{str(style).removeprefix('text-align:')}"


class _Renderer(RendererHTML):
    """What the page shows otherwise than CommonMark says. Methods are called by their tokens' types."""

    def link_open(self, tokens: Sequence[Token], idx: int, options: Any, env: Any) -> str:
        attributes = tokens[idx].attrs
        attributes |= {"target": "_blank", "rel": "noopener noreferrer nofollow"}
        if not attributes["href"]:  # nowhere: it would lead to this page
            del attributes["href"]
        return self.renderToken(tokens, idx, options, env)

    def image(self, tokens: Sequence[Token], idx: int, options: Any, env: Any) -> str:
        """Its description and its address: to load it would tell a stranger that the answer was read."""
        token = tokens[idx]
        alt = self.renderInlineAsText(token.children, options, env) or "without description"
        shown = f"Image: {alt} ({token.attrs.get('src', '')})"
        return f'<span class="image">{escapeHtml(shown)}</span>'

    def table_open(self, tokens: Sequence[Token], idx: int, options: Any, env: Any) -> str:
        """A wide table scrolls by itself, with the keyboard too."""
        return '<div class="table" tabindex="0" role="region" aria-label="Table"><table>\n'

    def table_close(self, tokens: Sequence[Token], idx: int, options: Any, env: Any) -> str:
        return "</table></div>\n"

    def fence(self, tokens: Sequence[Token], idx: int, options: Any, env: Any) -> str:
        token = tokens[idx]
        return _code(token.content, token.info.strip().split(maxsplit=1)[:1], env["highlighter"])

    def code_block(self, tokens: Sequence[Token], idx: int, options: Any, env: Any) -> str:
        return _code(tokens[idx].content, [], env["highlighter"])


def _code(code: str, languages: Sequence[str], highlighter: Highlighter) -> str:
    """A block of code under a bar with its language and a button that copies it."""
    language = languages[0] if languages else ""
    return (
        f'<div class="code"><div class="bar"><span>{escapeHtml(language)}</span>'
        '<button type="button" class="copy">Copy</button></div>'
        f'<pre tabindex="0"><code>{highlighter.highlight(code, language)}</code></pre></div>\n'
    )
