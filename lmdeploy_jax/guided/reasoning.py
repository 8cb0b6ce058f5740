"""Grammars that let a model think before what is asked of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lmdeploy_jax.guided.lark import ANY, Writer, without
from lmdeploy_jax.guided.response_format import Written, described, grammar_text
from lmdeploy_jax.text.parsers import ReasoningFormat
from lmdeploy_jax.text.tokenizer import Tokenizer

_GAP = "/[ \\n]{1,4}/"  # between the reasoning and a call


def after_reasoning(
    response_format: Mapping[str, Any] | None,
    tokenizer: Tokenizer,
    reasoning: ReasoningFormat,
    starts_in_reasoning: bool = False,
    forbidden: bool = False,
) -> dict[str, Any] | None:
    """A response format that holds from the end of the reasoning, and the format's gap behind it, on.

    starts_in_reasoning: the prompt has opened the reasoning already; otherwise the model may begin with it,
        or do without.
    forbidden: no reasoning: it does not begin, and where the prompt has opened it, it ends at once.

    Raises `RequestError` for a response format that is none.
    """
    text = grammar_text(response_format)
    if text is None:
        return None
    writer = Writer(tokenizer)
    begin = thinking(writer, reasoning, starts_in_reasoning, forbidden=forbidden, fixed_gap=True)
    first = {"lark_grammar": writer.grammar(f"{begin} @answer")}
    own = json.loads(text)["grammars"] if text.startswith("{") else [{"lark_grammar": text}]
    grammars = [first, {**own[0], "name": "answer"}, *own[1:]]
    assert response_format is not None
    name = described(response_format)
    combined = Written(json.dumps({"grammars": grammars}), name, {name: text})
    return {"type": "grammar", "grammar": combined}


def thinking(
    writer: Writer,
    reasoning: ReasoningFormat | None,
    started: bool,
    *,
    forbidden: bool = False,
    not_within: tuple[str, ...] = (),
    fixed_gap: bool = False,
) -> str:
    """The beginning of a rule: reasoning, free of the tags `not_within`, where there may be some.

    fixed_gap: what follows may begin with space itself, so that its reader must know what belongs to the gap.
    """
    if reasoning is None:
        return ""
    if forbidden:
        return writer.closing(reasoning.close, "", reasoning.gap) if started else ""
    body = f"({without(ANY, *not_within)})"
    if fixed_gap:
        rest = writer.until(body, reasoning.close, after=reasoning.gap)
    else:
        rest = f"{writer.until(body, reasoning.close)} {writer.rule(_GAP, 'GAP')}?"
    return rest if started else f"({writer.tag(reasoning.open)} {rest})?"
