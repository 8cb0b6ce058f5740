"""TeX as MathML, which browsers lay out by themselves. Of what the converter gives only known parts pass."""

from __future__ import annotations

import re
from functools import lru_cache
from html import unescape
from xml.etree.ElementTree import Element

from latex2mathml.converter import convert_to_element
from markdown_it.common.utils import escapeHtml

MOST_CHARACTERS = 4000  # of a formula; a longer one stays TeX
_PARTS = {  # how many parts an element must have
    **dict.fromkeys(("mfrac", "mover", "mroot", "msub", "msup", "munder"), 2),
    **dict.fromkeys(("msubsup", "munderover"), 3),
}
_OTHERS = "math mi mn mo mpadded mphantom mrow mspace msqrt mstyle mtable mtd mtext mtr"
ELEMENTS = frozenset(_PARTS) | frozenset(_OTHERS.split())
CLASSES = frozenset(("box", "updiagonalstrike", "downdiagonalstrike", "horizontalstrike", "right", "below"))
_BOOLEANS = "accent accentunder display displaystyle fence form largeop movablelimits separator stretchy"
_LENGTHS = "depth height linethickness lspace maxsize minsize rspace voffset width"
ATTRIBUTES = (  # and what they may say
    dict.fromkeys(_BOOLEANS.split(), r"true|false|block|inline|prefix|infix|postfix")
    | dict.fromkeys(_LENGTHS.split(), r"[+-]?\d{0,2}(\.\d{1,4})?(em|ex|pt|px|mu)?")
    | {"columnalign": r"left|right|center", "mathvariant": "normal", "scriptlevel": r"[+-]?\d"}
    | {"mathcolor": r"[a-zA-Z]{1,24}|#[0-9a-fA-F]{3,8}"}
)
_SAME = {  # environments that the converter does not know, by those that look alike
    **dict.fromkeys(("aligned", "align", "flalign", "eqnarray"), "align*"),
    **dict.fromkeys(("gather", "gathered", "multline"), "matrix"),
    **dict.fromkeys(("dcases", "rcases"), "cases"),
}
_ENVIRONMENT = re.compile(rf"\\(begin|end)\{{({'|'.join(_SAME)})\*?\}}")
_NUMBERING = re.compile(r"\\(nonumber|notag)(?![a-zA-Z])|\\label\{[^{}]*\}|\\(begin|end)\{equation\*?\}")
_LIMITED = frozenset(("lim", "max", "min", "sup", "inf", "lim sup", "lim inf", "det", "gcd", "Pr"))
_UNKNOWN = re.compile(r"\\[a-zA-Z]")  # a command that the converter gives back as it is


@lru_cache(1024)  # a paragraph is rendered again and again while it comes
def mathml(tex: str, *, block: bool) -> str | None:
    """An element `math`; None where the formula cannot be read, or holds a command that nobody knows.

    block: whether it stands for itself.
    """
    if len(tex) > MOST_CHARACTERS:
        return None
    try:
        known = _NUMBERING.sub("", _ENVIRONMENT.sub(lambda m: f"\\{m[1]}{{{_SAME[m[2]]}}}", tex))
        return _written(convert_to_element(known, display="block" if block else "inline"))
    except Exception:  # the converter's own have no base, and of malformed TeX it raises Python's as well
        return None


def _written(element: Element) -> str:
    """Raises ValueError for what must not pass or cannot be shown."""
    tag, classes = element.tag, element.get("notation", "").split()
    if tag == "menclose":  # browsers know it no more
        tag = "mrow"
    if _has_limit(element):
        tag = "munder"
        element[0].set("movablelimits", "true")
    if tag == "mtable":
        _draw_lines(element)
    text = unescape(element.text or "")
    if tag not in ELEMENTS or _UNKNOWN.search(text) or len(element) != _PARTS.get(tag, len(element)):
        raise ValueError(tag)
    given = {name: value for name, value in element.attrib.items() if _passes(name, value)}
    given |= {"class": " ".join(c for c in [*classes, *element.get("lines", "").split()] if c in CLASSES)}
    told = "".join(f' {name}="{value}"' for name, value in given.items() if value)
    return f"<{tag}{told}>{escapeHtml(text)}{''.join(map(_written, element))}</{tag}>"


def _passes(name: str, value: str) -> bool:
    return name in ATTRIBUTES and re.fullmatch(ATTRIBUTES[name], value) is not None


def _has_limit(element: Element) -> bool:
    """Whether what is written below stands under its operator where there is room, as in lim and max."""
    if element.tag != "msub" or element[0].tag != "mo":
        return False
    name = re.sub(r"\s", " ", unescape(element[0].text or ""))
    return name in _LIMITED or element[0].get("movablelimits") == "true"


def _draw_lines(table: Element) -> None:
    """Lines between columns and rows are the cells', as browsers have it."""
    columns, rows = (table.get(name, "").split() for name in ("columnlines", "rowlines"))
    for i, row in enumerate(table):
        below = "below" if "solid" in rows[i : i + 1] else ""
        for j, cell in enumerate(row):
            cell.set("lines", f"{below} {'right' if 'solid' in columns[j : j + 1] else ''}")
