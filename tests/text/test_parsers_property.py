"""For every format, over generated answers: what was written is read, and any split is the whole."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmdeploy_jax.text.parsers import Block, ContentDelta, Event, ParsedAnswer, ReasoningDelta, collect
from lmdeploy_jax.text.parsers.json_scan import JsonScanner
from tests.fuzz import cases, drawn
from tests.text.parser_formats import WRITERS, Calls, new_parser, parse, pieces, stream

WHOLE = 1000  # cases of each format and property
WORDS = st.text('aé😀"\\{}[]<>/｜ \n;`', max_size=8)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 99) | st.just(0.5) | WORDS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(WORDS, inner, max_size=2),
    max_leaves=4,
)
CALLS: st.SearchStrategy[Calls] = st.lists(
    st.just(("now", {}))
    | st.tuples(
        st.just("add"), st.fixed_dictionaries({"a": st.integers(-9, 99)}, optional={"b": st.just(1.5)})
    )
    | st.tuples(
        st.just("write"),
        st.fixed_dictionaries(
            {}, optional={"text": WORDS, "path": WORDS, "tags": st.lists(VALUES, max_size=3)}
        ),
    ),
    min_size=1,
    max_size=3,
)
CUTS = st.lists(st.integers(0, 200), max_size=6)
PROSE = st.text("ab é😀<[｜\n", max_size=12)
# Half tags of every format, and what stands between them. None of them can complete another's half think tag.
SCRAPS = [
    *(
        "<",
        "</",
        "<thi",
        "</thi",
        "<think>",
        "</think>",
        "\n",
        " ",
        "ok",
        "é😀",
        ";",
        "[",
        "]",
        ",",
        '"',
        "\\",
    ),
    *(
        "<tool_call>",
        "<tool_ca",
        "</tool_call>",
        "<function=add>",
        "<parameter=a>",
        "</parameter>",
        "</function>",
    ),
    *("<arg_key>", "a</arg_key>", "<arg_value>", "</arg_value>", "add", "<|python_tag|>", "<|action_start|>"),
    *(
        "<|plugin|>",
        "<|action_end|>",
        "[TOOL_CALLS]",
        "[ARGS]",
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁call▁begin｜>",
    ),
    *(
        "function",
        "<｜tool▁sep｜>",
        "```json\n",
        "```",
        "<｜tool▁call▁end｜>",
        "<｜tool▁calls▁end｜>",
        "{}",
        "{",
        "}",
    ),
    *(
        '{"name": "add", ',
        '"arguments": ',
        '"parameters": {"a": 1}',
        '{"arguments": "{\\"a\\": \\u00e9"',
        '"name":',
    ),
    *('"{\\"a\\": 1}"', '"\\ud83d', "nul", "-1.5e", '"id": [1, "x"], '),
    *("[add(", "a=1", "b='x\\", "'", ")", "<|python_start|>", "<|python_end|>", "(", "{'k': (1,", "True"),
    *("<|tool_call>", "call:add{", "a:", '<|"|>', "<tool_call|>", "[1,", "<｜DSML｜function_calls>"),
    *('<｜DSML｜invoke name="add">', '<｜DSML｜parameter name="a" string="', 'true">', "</｜DSML｜invoke>"),
]


@st.composite
def answers(draw: st.DrawFn, write: Callable[[Calls], str]) -> str:
    """Good answers, answers with something cut out or put in, and heaps of scraps."""
    if draw(st.booleans()):
        return "".join(draw(st.lists(st.sampled_from(SCRAPS), max_size=10)))
    thought = draw(st.sampled_from(["", "<think>a</think>\n", "a</think>"]))
    text = thought + draw(PROSE) + write(draw(CALLS)) + draw(PROSE)
    start, length = draw(st.integers(0, len(text))), draw(st.sampled_from([0, 0, 1, 9, len(text)]))
    return text[:start] + draw(st.sampled_from(["", "", *SCRAPS])) + text[start + length :]


@cases(WHOLE)
@pytest.mark.parametrize(("tools", "write"), WRITERS)
def test_what_was_written_is_read(tools: str, write: Callable[[Calls], str], cases: int) -> None:
    @drawn(cases)
    @given(CALLS, PROSE, PROSE, st.sampled_from(["", "\n", "<think>hm</think>\n"]), CUTS)
    def check(calls: Calls, before: str, after: str, thought: str, cuts: list[int]) -> None:
        bare = write.__name__ in (
            "llama3_bare",
            "pythonic",
        )  # such calls stand at the answer's start or not at all
        text = thought + ("" if bare else before) + write(calls) + after
        answer = collect(stream(new_parser(tools, "default"), pieces(text, cuts)))
        assert [(call.name, json.loads(call.arguments)) for call in answer.tool_calls] == list(calls)
        assert answer.reasoning == ("hm" if thought.startswith("<") else "")
        assert visible(answer.content) == visible(after if bare else before + after)

    check()


@cases(WHOLE)
@pytest.mark.parametrize(("tools", "write"), WRITERS)
def test_any_split_is_the_whole_and_nothing_is_lost(
    tools: str, write: Callable[[Calls], str], cases: int
) -> None:
    @drawn(cases)
    @given(answers(write), st.sampled_from([None, "default"]), st.booleans(), CUTS)
    def check(text: str, reasoning: str | None, starts: bool, cuts: list[int]) -> None:
        starts = starts and reasoning is not None
        whole, log = parse_and_log(text, tools, reasoning, starts)
        for parts in (text, pieces(text, cuts)):
            assert collect(stream(new_parser(tools, reasoning, starts), parts)) == whole
        assert visible(log) == visible(text)
        for call in whole.tool_calls:
            assert is_arguments_prefix(call.arguments)

    check()


def parse_and_log(text: str, tools: str, reasoning: str | None, starts: bool) -> tuple[ParsedAnswer, str]:
    """The answer, and the text put together again from the content, the reasoning and the raw blocks."""
    log: list[str] = []

    class Events(list[Event]):
        def append(self, event: Event) -> None:
            super().append(event)
            if isinstance(event, ContentDelta | ReasoningDelta):
                log.append(event.text)

    class LoggingBlock(Block):
        def commit(self, keep: int = 0) -> None:
            log.append("".join(self.raw[: len(self.raw) - keep]))
            super().commit(keep)

    parser = new_parser(tools, reasoning, starts)
    parser.events = Events()
    with mock.patch("lmdeploy_jax.text.parsers.answer.Block", LoggingBlock):
        answer = collect(stream(parser, [text]))
    return answer, "".join(log)


def visible(text: str) -> str:
    """Without what belongs to the format: space, and the reasoning tags, those too that are left where
    another one stood within them.
    """
    while (left := text.replace("<think>", "").replace("</think>", "")) != text:
        text = left
    return "".join(text.split())


def is_arguments_prefix(arguments: str) -> bool:
    scanner = JsonScanner()
    return arguments.startswith("{") and all(map(scanner.push, arguments))


@cases(WHOLE)
def test_reasoning_alone(cases: int) -> None:
    @drawn(cases)
    @given(
        st.lists(st.sampled_from(["<think>", "</think>", "<th", "ink>", "a", " ", "\n", "</"]), max_size=8),
        st.booleans(),
    )
    def check(scraps: list[str], starts: bool) -> None:
        text = "".join(scraps)
        whole = parse(text, None, "default", starts)
        assert collect(stream(new_parser(None, "default", starts), text)) == whole
        assert whole == reasoning_reference(text, starts)

    check()


def reasoning_reference(text: str, starts: bool) -> ParsedAnswer:
    """The definition, on the complete text."""
    reasoning: list[Any] = []
    block_before = False
    while starts or text.lstrip().startswith("<think>"):
        if text.lstrip().startswith("<think>") and not (starts and block_before):
            text = text.lstrip().removeprefix("<think>")
            block_before = True
        starts = False
        thought, close, text = text.partition("</think>")
        thought = thought.strip("\n") if close and thought.strip() else thought.lstrip("\n")
        reasoning.append(thought if thought.strip() or not (close or block_before) else "")
        block_before = True
        if not close:
            break
    content = text.lstrip("\n") if block_before and text.strip() else "" if block_before else text
    return ParsedAnswer(content, "".join(reasoning), [])
