"""Answers as HTML: what is shown, what never passes, and what hostile text costs."""

from __future__ import annotations

import html
import json
import re
import time
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmdeploy_jax.errors import RequestError
from lmdeploy_jax.server.page import mathml
from lmdeploy_jax.server.page import renderer as renderer_module
from lmdeploy_jax.server.page.highlight import Highlighter
from lmdeploy_jax.server.page.markdown import render
from lmdeploy_jax.server.page.renderer import Renderer
from lmdeploy_jax.server.page.route import MOST_CHARACTERS
from tests import patience
from tests.fuzz import cases, drawn
from tests.server.hostile_markdown import HOSTILE
from tests.server.live import serving


def rendered(text: str) -> str:
    parts = render(text)
    return parts.settled + parts.open


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("**a** ~~b~~", "<p><strong>a</strong> <s>b</s></p>\n"),
        ("[a](https://b.c 'd')", 'href="https://b.c" title="d" target="_blank" rel="noopener'),
        ("[a]()", '<a target="_blank" rel="noopener noreferrer nofollow">a</a>'),
        ("<mailto:a@b.c>", 'href="mailto:a@b.c"'),
        ("|a|\n|-:|\n|1|", '<td class="align-right">1</td>'),
        (r"\(x_1*y\) and $a_1$", "<mo>*</mo><mi>y</mi></mrow></math> and <math"),
        (r"a $\foo_1$ and \[x", r'<p>a <span class="math">$\foo_1$</span> and [x</p>'),
        ("a:\n$$\nx\n- y\n= z\n$$\nb", "<mi>x</mi><mo>\u2212</mo><mi>y</mi><mo>=</mo><mi>z</mi>"),
        (
            "$$x$$",
            '<div class="formula" tabindex="0"><math display="block"><mrow><mi>x</mi></mrow></math></div>',
        ),
        ("- a\n  $$\n  x\n  $$\n- b", "</math></div>\n</li>\n<li>b</li>"),
        ("$$\nx\n\ny\n$$", "<p>$$\nx</p>"),
        (r"$\boxed{42}$", '<mrow class="box"><mrow><mn>42</mn></mrow></mrow>'),
        (r"$\lim_{x}$", '<munder><mo movablelimits="true">lim</mo><mrow><mi>x</mi></mrow></munder>'),
        (r"\begin{aligned}", "<p>\\begin{aligned}</p>"),
        (r"\[\begin{aligned}a&=b\nonumber\end{aligned}\]", '<mtd columnalign="right"><mi>a</mi></mtd>'),
        (r"$\begin{array}{c|c}1&2\\ \hline 3&4\end{array}$", 'class="below right"><mn>1</mn>'),
        (r"$\frac{1}$", r'<span class="math">$\frac{1}$</span>'),
        ("it costs $5 or $6", "<p>it costs $5 or $6</p>\n"),
        ("```python\nx = 1\n```", '<span>python</span><button type="button" class="copy">Copy</button>'),
        ("```\na < b\n```", "<code>a &lt; b\n</code>"),
    ],
)
def test_it_looks_as_it_should(text, expected):
    assert expected in rendered(text)


ELEMENTS = frozenset(
    re.findall(
        r"\w+",
        "p h1 h2 h3 h4 h5 h6 em strong s a ul ol li blockquote hr br code pre span div button "
        "table thead tbody tr th td",
    )
)
ATTRIBUTES = {"href", "title", "target", "rel", "class", "tabindex", "role", "aria-label", "type", "start"}
OF_MATHML = re.compile(r"[a-zA-Z0-9.+#-]*")  # what a formula's attributes may say


class Elements(HTMLParser):
    """Refuses what no answer may bring."""

    def handle_starttag(self, tag, attrs):
        assert tag in ELEMENTS | mathml.ELEMENTS, tag
        for name, value in attrs:
            if tag in mathml.ELEMENTS and name != "class":
                assert name in mathml.ATTRIBUTES, name
                assert OF_MATHML.fullmatch(value), value
                continue
            assert name in ATTRIBUTES, name
            assert name != "href" or re.match("(https?|mailto):", value), value

    def handle_decl(self, decl):
        raise AssertionError(decl)

    handle_pi = unknown_decl = handle_comment = handle_decl


@pytest.mark.parametrize("text", HOSTILE)
def test_nothing_hostile_passes(text):
    for around in ("{}", "> {}", "- {}", "**{}**", "|a|\n|-|\n|{}|", "a\n{}\nb"):
        Elements().feed(rendered(around.format(text)))


BITS = (
    "*", "_", "**", "`", "```", "~~", "#", "> ", "- ", "1. ", "\n", "\n\n", "    ", "\t", "|", "|-|\n",
    "[", "](", ")", "!", "<", ">", "</", "&", "&#", ";", "\\", "$", "$$", r"\(", r"\)", r"\[", "a", "1", " ",
    "javascript:", "https://x.y", "data:", '"', "'", "onload=", "<script>", "<img ", "```python\n", "<<",
    r"\frac", r"\href{", r"\text{", r"\begin{aligned}", r"\end{aligned}", "{", "}", "_{", "^", "&",
    r"\class{", "```html\n", "${", "{{", "\x00", "\u2028", "ä", "😀",
)  # fmt: skip


def without_space(shown: str) -> str:
    """Empty lines in the end of an open block of code count or not, depending on what comes."""
    return re.sub(r'<span class="w">\s*</span>|\s', "", shown)


@cases(20_000)
def test_whatever_is_drawn_brings_nothing_of_its_own(cases):
    @drawn(cases)
    @given(st.lists(st.sampled_from(BITS), max_size=60).map("".join))
    def check(text):
        parts = render(text)
        for part in (parts.settled, parts.open):
            Elements().feed(part)
        lines = text.replace("\x00", "\ufffd").split("\n")
        alone = rendered("\n".join(lines[: parts.settled_lines]))
        assert not parts.settled or without_space(parts.settled) == without_space(alone)

    check()


def test_code_of_any_language_is_what_was_written():
    code = "x = 'a<b' # \"ü\"\n<?php $a=1; ?>\n\n\tend\r{{ y }} ${z}"
    for language in ("python", "bash", "php", "html", "jinja", "diff", "c++", "rust", "console", "nonsense"):
        shown = html.unescape(re.sub("<[^>]*>", "", Highlighter().highlight(code, language)))
        assert shown == code, language


def test_code_that_a_lexer_cannot_cope_with_stays_plain():
    """Its expression for here-documents takes time that grows with the cube of this."""
    code = "<<" + "a" * 20_000
    highlighter = Highlighter()
    assert highlighter.highlight("echo hi", "bash") != "echo hi"
    assert highlighter.highlight(code, "bash") == html.escape(code)
    assert highlighter.highlight("x = 1", "python") == "x = 1", "its time is over"


GROWING = {
    "nested quotes": lambda n: "> " * n,
    "nested lists": lambda n: "- " * n,
    "brackets": lambda n: "[" * n,
    "images": lambda n: "![" * n,
    "links": lambda n: "[a](" * n,
    "emphasis": lambda n: "*_" * n,
    "backticks": lambda n: "".join("`" * (i % 300) + " " for i in range(n // 100)),
    "formulas": lambda n: "$a " * n,
    "dollars": lambda n: "$" * n,
    "display formulas": lambda n: "$$\na\n" * (n // 4),
    "long formula": lambda n: "$$" + "x+" * n + "$$",
    "nested formula": lambda n: "$$" + r"\sqrt{" * n + "}" * n + "$$",
    "many formulas": lambda n: "".join(f"${i}_x$ " for i in range(n // 8)),
    "open formulas": lambda n: r"\(\[$$" * n,
    "table": lambda n: "|a" * 20 + "\n" + "|-" * 20 + "\n" + "|a\n" * (n // 4),
    "definitions": lambda n: "".join(f"[{i}]: x\n" for i in range(n // 2)),
    "entities": lambda n: "&#35;" * n,
}


@pytest.mark.parametrize("kind", GROWING)
def test_hostile_text_takes_time_in_proportion(kind):
    def seconds(n: int) -> float:
        times = []
        for _ in range(2):
            start = time.process_time()
            rendered(GROWING[kind](n))
            times.append(time.process_time() - start)
        return min(times)

    seconds(100)
    calm = (
        seconds(8000) < 11 * seconds(2000) + 0.05 for _ in range(3)
    )  # a busy machine's caches are others' too
    assert any(calm), "four times as much took more than eleven times as long"


def test_a_huge_table_ends_somewhere():
    """Rows are filled up with cells that nobody has written, here a thousand in each of 20,000."""
    text = "|a" * 1000 + "\n" + "|-" * 1000 + "\n" + "|a\n" * 20_000
    assert 10_000 < rendered(text).count("<td") < 100_000


def test_what_is_settled_stays_while_text_is_added():
    text = "# A\n\nb *c*\n\n```python\nx = 1\n\ny = 2\n```\n\n- d\n\n  e\n- f\n\n|g|\n|-|\n|h|\n\nlast"
    lines, settled = text.split("\n"), ""
    for end in range(1, len(text) + 1):
        parts = render(text[:end])
        assert parts.settled.startswith(settled) or not parts.settled
        settled = parts.settled
        kept = "\n".join(lines[: parts.settled_lines])
        assert rendered(kept) == settled
        assert rendered("\n".join(text[:end].split("\n")[parts.settled_lines :])) == parts.open


def ask(live, body, key=None):
    headers = {"authorization": f"Bearer {key}"} if key else {}
    return patience.post(f"{live.url}/markdown", json=body, headers=headers)


def test_the_route(live):
    answer = ask(live, {"text": "a\n\n*b*"})
    assert answer.json() == {"settled": "<p>a</p>\n", "settled_lines": 2, "open": "<p><em>b</em></p>\n"}
    refused = ask(live, {"text": "a" * (MOST_CHARACTERS + 1)})
    assert refused.status_code == 400
    assert "at most 64000 characters" in refused.json()["error"]["message"]


def test_the_route_has_the_keys_and_limits_of_others(pipe):
    with serving(pipe.frontend, api_keys=["k"], max_body_size=100) as live:
        assert ask(live, {"text": "a"}).status_code == 401
        assert ask(live, {"text": "a"}, "k").status_code == 200
        assert ask(live, {"text": "a" * 100}, "k").status_code == 413
        for path in ("/", "/static/chat.js", "/static/chat.css", "/docs"):
            assert patience.get(live.url + path).status_code == 200
        for path in ("/static/../page/route.py", "/static/%2e%2e/route.py", "/static/route.py"):
            assert patience.get(live.url + path).status_code in (401, 404)


def test_a_text_that_ends_the_process_is_refused_and_the_next_one_served(monkeypatch):
    monkeypatch.setattr(renderer_module, "_START", "import sys; sys.path[:] = {!r}; {}; raise SystemExit(3)")
    broken = Renderer()
    with pytest.raises(RequestError, match="its process ended with code"):
        broken.render("a")
    monkeypatch.undo()
    assert json.loads(broken.render("a"))["open"] == "<p>a</p>\n"
