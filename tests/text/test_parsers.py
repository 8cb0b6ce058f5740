"""Answers as models write them, cut at every place, and what comes when."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import lmdeploy_jax
from lmdeploy_jax.errors import ConfigError
from lmdeploy_jax.text import Tokenizer
from lmdeploy_jax.text.chat_template import normalise_messages, select
from lmdeploy_jax.text.parsers import (
    AnswerParser,
    Block,
    Call,
    ContentDelta,
    ParsedAnswer,
    Reading,
    ReasoningDelta,
    ReasoningFormat,
    ToolCall,
    ToolCallArguments,
    ToolCallStart,
    ToolFormat,
    collect,
    read_object,
    reasoning_format,
    reasoning_format_names,
    register_reasoning_format,
    register_tool_format,
    tool_format,
    tool_format_names,
)
from tests.text.parser_formats import WRITERS, Calls, new_parser, parse, stream
from tests.text.samples import CALL, TOOLS, USER

NOW = ToolCall("now", "{}")
NOW_BLOCK = '<tool_call>{"name": "now", "arguments": {}}</tool_call>'
EXAMPLES = [
    # tools, text, content, reasoning, calls
    ("qwen", f"Hi.\n{NOW_BLOCK}\n{NOW_BLOCK}\n", "Hi.\n", "", [NOW, NOW]),
    ("qwen", f"{NOW_BLOCK}\n\nDone.", "\n\nDone.", "", [NOW]),
    ("qwen", "  ", "  ", "", []),
    ("qwen", "a < b <", "a < b <", "", []),
    ("qwen", "x <tool_cal", "x <tool_cal", "", []),
    ("qwen", "<<tool_call>>", "<<tool_call>>", "", []),
    ("qwen", '<tool_call>{"arguments": {"a": [1]}, "id": "7", "name": "f"}</tool_call>', "", "", [("f", '{"a": [1]}')]),
    ("qwen", '<tool_call>{"name": "f"}</tool_call>', "", "", [("f", "{}")]),
    ("qwen", r'<tool_call>{"name": "f", "arguments": "{\"a\": \"\ud83d\ude00\\n\u00e9\"}"}</tool_call>', "", "",
     [("f", r'{"a": "\ud83d\ude00\né"}')]),
    ("qwen", '<tool_call>{"arguments": "{}", "name": "f"}</tool_call>!', "!", "", [("f", "{}")]),
    # Bad before the arguments began: all of it is content.
    ("qwen", "<tool_call>oops</tool_call>", "<tool_call>oops</tool_call>", "", []),
    ("qwen", '<tool_call>{"name": "f", "arguments": 3}</tool_call>', '<tool_call>{"name": "f", "arguments": 3}</tool_call>', "", []),
    ("qwen", 'a \n<tool_call>{"name": "f", "argu', 'a \n<tool_call>{"name": "f", "argu', "", []),
    ("qwen", '<tool_call>{"arguments": {"a": 1}}</tool_call>', '<tool_call>{"arguments": {"a": 1}}</tool_call>', "", []),
    ("qwen", f"<tool_call> {NOW_BLOCK}", "<tool_call> ", "", [NOW]),
    # Bad after that: the call is taken back, and all of it is content.
    ("qwen", 'a \n<tool_call>{"name": "f", "arguments": {"a": oops}}', 'a \n<tool_call>{"name": "f", "arguments": {"a": oops}}', "", []),
    ("qwen", '<tool_call>\n{"name": "f", "arguments": {"a"}}\n</tool_call>', '<tool_call>\n{"name": "f", "arguments": {"a"}}\n</tool_call>', "", []),
    ("qwen", '<tool_call>{"name": "f", "arguments": {"a": "cut o', '<tool_call>{"name": "f", "arguments": {"a": "cut o', "", []),
    ("qwen", f'<tool_call>{{"name": "f", "arguments": {{"a": {NOW_BLOCK}', '<tool_call>{"name": "f", "arguments": {"a": ', "", [NOW]),
    ("qwen", f'{NOW_BLOCK}<tool_call>{{"name": "f", "arguments": {{]', '<tool_call>{"name": "f", "arguments": {]', "", [NOW]),
    ("qwen", '<think>hm <tool_call>{"name": "f", "arguments": {]\n</think>x', "x", 'hm <tool_call>{"name": "f", "arguments": {]', []),
    ("mistral", '[TOOL_CALLS] [{"name": "now", "arguments": {}}, {"name": "f", "arguments": {]', ', {"name": "f", "arguments": {]', "", [NOW]),
    # Bad after the arguments: the rest is content.
    ("qwen", '<tool_call>{"name": "now", "arguments": {}}', "", "", [NOW]),
    ("qwen", '<tool_call>{"name": "now", "arguments": {}}</tool_', "</tool_", "", [NOW]),
    # Reasoning.
    ("qwen", f"<think>\nhm\n</think>\n\n{NOW_BLOCK}", "", "hm", [NOW]),
    ("qwen", "<think>\n\n a\n\nb \n\n</think>\n\n  x\n", "  x\n", " a\n\nb ", []),
    ("qwen", "<think>hm\n\n", "", "hm\n\n", []),
    ("qwen", f"<think>hm\n{NOW_BLOCK}", "", "hm\n", [NOW]),
    ("qwen", "<think>hm\n<tool_call>\n</think>\nx", "x", "hm\n<tool_call>", []),
    ("qwen", f"<think>hm {NOW_BLOCK}</think>x", "</think>x", "hm ", [NOW]),
    ("qwen", "<think>say <tool_call> so</think>x", "x", "say <tool_call> so", []),
    ("qwen", "<think>hm", "", "hm", []),
    ("qwen", "<think>\n\n</think>\n\nx", "x", "", []),
    ("qwen", "The <think> tag </think>.", "The <think> tag </think>.", "", []),
    ("qwen", f"{NOW_BLOCK}\n<think>hm</think>x", "x", "hm", [NOW]),
    # Llama's bare calls.
    ("llama3", '{"name": "now", "parameters": {}}', "", "", [NOW]),
    ("llama3", '{"name": "Bob", "parameters": {}}', '{"name": "Bob", "parameters": {}}', "", []),
    ("llama3", '{"name": "now"}', '{"name": "now"}', "", []),
    ("llama3", '{"city": "Köln"}', '{"city": "Köln"}', "", []),
    ("llama3", 'So {"name": "now", "parameters": {}}', 'So {"name": "now", "parameters": {}}', "", []),
    ("llama3", '{"type": "function", "name": "now", "parameters": {}}; bye', "; bye", "", [NOW]),
    ("llama3", '<|python_tag|>search.call(query="x")', '<|python_tag|>search.call(query="x")', "", []),
    ("mistral", "[TOOL_CALLS] []", "[TOOL_CALLS] []", "", []),
    ("mistral", '[TOOL_CALLS] [{"name": "now", "arguments": {}, "id": "a1"}] ok', " ok", "", [NOW]),
    ("mistral", '[TOOL_CALLS] [{"name": "now", "arguments": {}}, oops]', ", oops]", "", [NOW]),
    ("internlm", '<|action_start|> <|plugin|>{"name": "now", "parameters": {}}<|action_end|>', "", "", [NOW]),
    ("internlm", "<|action_start|><|interpreter|>x", "<|action_start|><|interpreter|>x", "", []),
    ("qwen3coder", "<tool_call>\n<function=now>\n</function>\n</tool_call>", "", "", [NOW]),
    ("qwen3coder", "<tool_call><function=write><parameter=path>\n\"a\"\n\n\tb\n</parameter></function></tool_call>", "", "",
     [("write", r'{"path": "\"a\"\n\n\tb"}')]),
    ("qwen3coder", "<tool_call><function=add><parameter=a>1</parameter><parameter=b>x</parameter></function></tool_call>",
     "", "", [("add", '{"a": 1, "b": "x"}')]),
    ("qwen3coder", "<tool_call><function=write><parameter=path>a</para", "<tool_call><function=write><parameter=path>a</para", "", []),
    ("qwen3coder", "<tool_call><function=add><parameter=a>1", "<tool_call><function=add><parameter=a>1", "", []),
    ("glm4", "<tool_call>now</tool_call>", "", "", [NOW]),
    # What no schema names is text, whatever it looks like: identifiers keep their digits.
    ("glm4", "<tool_call>new<arg_key>k</arg_key><arg_value>[1]</arg_value></tool_call>", "", "", [("new", '{"k": "[1]"}')]),
    ("glm4", "<tool_call>add<arg_key>zip</arg_key><arg_value>077004</arg_value></tool_call>", "", "", [("add", '{"zip": "077004"}')]),
    ("qwen3coder", "<tool_call>\n<function=add>\n<parameter=zip>\ntrue\n</parameter>\n</function>\n</tool_call>", "", "", [("add", '{"zip": "true"}')]),
]  # fmt: skip


@pytest.mark.parametrize(("tools", "text", "content", "reasoning", "calls"), EXAMPLES)
def test_examples_cut_at_every_place(
    tools: str, text: str, content: str, reasoning: str, calls: list[ToolCall | tuple[str, str]]
) -> None:
    wanted = [call if isinstance(call, ToolCall) else ToolCall(*call) for call in calls]
    expected = ParsedAnswer(content, reasoning, wanted)
    for cut in range(len(text) + 1):
        assert collect(stream(new_parser(tools, "default"), [text[:cut], text[cut:]])) == expected
    assert collect(stream(new_parser(tools, "default"), text)) == expected


MALFORMED = [
    ("qwen", NOW_BLOCK, False),
    ("qwen", f"{NOW_BLOCK}</tool_call>", False),  # the call can be used
    ("qwen", "x <tool_cal", False),
    ("qwen", "<tool_call>oops</tool_call>", True),
    ("qwen", '<tool_call>{"name": "f", "arguments": {]', True),
    ("qwen", "<think>say <tool_call> so</think>x", False),  # thoughts may well speak of tags
    ("llama3", '{"city": "Köln"}', False),
    ("llama3", '{"name": "now", "parameters": {}}; bye', False),
    ("llama3", '{"name": "now", "parameters": {}}; {"name": "now", oops', True),
    ("mistral", '[TOOL_CALLS] [{"name": "now", "arguments": {}}, {"name": "now", oops]', True),
    ("mistral", '[TOOL_CALLS] [{"name": "now", "arguments": {}}] {', False),
    ("deepseek-v3", "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜>"
                    "<｜tool▁call▁begin｜>oops", True),
]  # fmt: skip


@pytest.mark.parametrize(("tools", "text", "malformed"), MALFORMED)
def test_whether_a_call_is_malformed(tools: str, text: str, malformed: bool) -> None:
    for cut in range(len(text) + 1):
        parser = new_parser(tools, "default")
        stream(parser, [text[:cut], text[cut:]])
        assert parser.malformed is malformed


def test_a_call_that_a_limit_cuts_is_the_beginning_of_one() -> None:
    for text, calls in (
        ('<tool_call>{"name": "f", "arguments": {"a": "x', [ToolCall("f", '{"a": "x')]),
        ('<tool_call>{"name": "f", "argu', []),
    ):
        parser = new_parser("qwen")
        answer = collect(parser.feed(text) + parser.finish(cut_off=True))
        assert (answer.tool_calls, parser.malformed) == (calls, False)


@pytest.mark.parametrize(
    ("text", "content", "reasoning"),
    [
        ("hm</think>x", "x", "hm"),
        ("\n<think>hm</think>x", "x", "hm"),
        ("hm", "", "hm"),
        ("</think>x", "x", ""),
        ("hm </thi", "", "hm </thi"),
    ],
)
def test_reasoning_that_the_prompt_opened(text: str, content: str, reasoning: str) -> None:
    assert parse(text, "qwen", "default", starts=True) == ParsedAnswer(content, reasoning, [])


def test_the_prompt_tells_whether_it_opened_the_reasoning() -> None:
    assert ReasoningFormat().opened_by("<|assistant|><think>\n")
    assert not ReasoningFormat().opened_by("<|assistant|><think>\n\n</think>\n\n")


def test_without_formats_everything_is_content() -> None:
    text = f" <think>hm</think>{NOW_BLOCK}"
    assert AnswerParser(None, None).feed(text)[0] == ContentDelta(text)


def test_arguments_come_as_they_are_written() -> None:
    parser = new_parser("qwen")
    assert parser.feed('Ok.<tool_call>{"name": "f", "arguments": ') == [ContentDelta("Ok.")]
    assert parser.feed('{"a": "x') == [ToolCallStart(0, "f"), ToolCallArguments(0, '{"a": "x')]
    assert parser.feed("y") == [ToolCallArguments(0, "y")]
    assert parser.feed('"}}</tool_') == [ToolCallArguments(0, '"}')]
    assert parser.feed("call>") == []
    assert parser.finish() == []


def test_tagged_strings_come_as_they_are_written_but_for_half_an_end_tag() -> None:
    parser = new_parser("qwen3coder")
    assert parser.feed("<tool_call><function=write><parameter=path>\nab\n</par") == [
        ToolCallStart(0, "write"),
        ToolCallArguments(0, '{"path": "ab'),
    ]
    assert parser.feed("k") == [ToolCallArguments(0, "\\n</park")]


@pytest.mark.parametrize(("tools", "write"), WRITERS)
def test_a_call_of_a_tool_that_nobody_offers_is_text(tools: str, write: Callable[[Calls], str]) -> None:
    text = write([("transfer", {"path": "x"})])
    answer = parse(text, tools)
    assert answer.tool_calls == []
    assert "transfer" in answer.content
    assert [call.name for call in parse(write([("write", {"path": "x"})]), tools).tool_calls] == ["write"]


def test_content_waits_only_for_half_a_tag() -> None:
    parser = new_parser("qwen", "default")
    assert parser.feed("a<tool") == [ContentDelta("a")]
    assert parser.feed("s> b") == [ContentDelta("<tools> b")]
    assert new_parser("qwen", "default", starts=True).feed("hm") == [ReasoningDelta("hm")]


def test_a_finished_parser_takes_nothing() -> None:
    parser = new_parser("qwen")
    parser.finish()
    with pytest.raises(RuntimeError, match="new AnswerParser"):
        parser.feed("x")


def test_long_answers_take_linear_time() -> None:
    """Seconds would become hours if a character's cost grew with the answer."""
    arguments = json.dumps({"text": "x" * 100_000})
    text = (
        f'<tool_call>{{"arguments": {arguments}, "name": "f"}}</tool_call>' + "\n" * 100_000 + "<" * 100_000
    )
    assert parse(text, "qwen").tool_calls == [ToolCall("f", arguments)]


def test_reading_the_shipped_template_gives_back_its_calls() -> None:
    folder = Path(lmdeploy_jax.__file__).parent / "assets" / "tiny-chat"
    template = select(Tokenizer(folder), folder)
    before = template.render(normalise_messages([USER]), tools=TOOLS)
    whole = template.render(normalise_messages([USER, CALL]), tools=TOOLS, add_generation_prompt=False)
    answer = parse(whole.removeprefix(before).removesuffix("<|im_end|>\n"), "qwen3", "qwen3")
    wanted = [call["function"] for call in CALL["tool_calls"]]
    assert [call.name for call in answer.tool_calls] == [call["name"] for call in wanted]
    assert [json.loads(call.arguments) for call in answer.tool_calls] == [
        json.loads(call["arguments"]) if isinstance(call["arguments"], str) else call["arguments"]
        for call in wanted
    ]


def test_formats_by_name() -> None:
    assert {name for name, _ in WRITERS} <= set(tool_format_names())
    assert {"qwen", "qwen3", "qwen2d5", "glm4", "glm45", "glm47"} <= set(tool_format_names())
    assert {"default", "qwen3", "deepseek-v3", "deepseek-r1"} <= set(reasoning_format_names())
    with pytest.raises(ConfigError, match=r"no tool parser 'nix'.*qwen3coder"):
        tool_format("nix")
    with pytest.raises(ConfigError, match=r"no reasoning parser 'nix'.*default"):
        reasoning_format("nix")
    with pytest.raises(ConfigError, match="taken"):
        register_tool_format("qwen", lambda: tool_format("qwen"))
    with pytest.raises(ConfigError, match="reasoning format"):
        AnswerParser(None, None, starts_in_reasoning=True)
    with pytest.raises(ConfigError, match="empty"):
        ToolFormat(("",), tool_format("qwen").read)
    with pytest.raises(ConfigError, match="empty"):
        ReasoningFormat(close="")


def test_special_tokens_that_must_stay_in_the_text() -> None:
    needing = {name for name in tool_format_names() if tool_format(name).special_tokens}
    assert {"internlm", "llama3", "mistral", "deepseek-v3", "glm4"} <= needing
    assert needing.isdisjoint({"qwen", "qwen3", "qwen2d5", "qwen3coder"})


def test_formats_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(block: Block) -> Reading[None]:
        call = Call(block, (yield from block.word(but="{")))
        yield from block.space()
        yield from read_object(block, call)
        yield from block.close("</call>")

    monkeypatch.setattr("lmdeploy_jax.text.parsers.registry._TOOL_FORMATS", {})
    monkeypatch.setattr("lmdeploy_jax.text.parsers.registry._REASONING_FORMATS", {})
    register_tool_format("mine", lambda: ToolFormat(("<call>",), read))
    register_reasoning_format("mine", lambda: ReasoningFormat("[", "]"))
    answer = parse('[hm]<call>f {"a": 1}</call>x<call>', "mine", "mine")
    assert answer == ParsedAnswer("x<call>", "hm", [ToolCall("f", '{"a": 1}')])


def harmony_answer(*messages: str) -> str:
    """What a model writes behind `<|start|>assistant`; the mark that ends it is no text."""
    return "<|end|><|start|>assistant".join(messages)


def test_the_channels_of_harmony() -> None:
    thought = "<|channel|>analysis<|message|>It is 2 + 2.\n"
    final = "<|channel|>final<|message|>Four, or <b>4</b>."
    call = '<|channel|>commentary to=functions.add <|constrain|>json<|message|>{"a": 2, "b": 2}'
    preamble = "<|channel|>commentary<|message|>I add."

    def read(text: str) -> ParsedAnswer:
        whole = parse(text, "gpt-oss", "gpt-oss")
        cut = collect(stream(new_parser("gpt-oss", "gpt-oss"), text))
        assert cut == whole
        return whole

    answer = read(harmony_answer(thought, final))
    assert (answer.reasoning, answer.content) == ("It is 2 + 2.", "Four, or <b>4</b>.")
    answer = read(harmony_answer(thought, preamble, call))
    assert (answer.reasoning, answer.content) == ("It is 2 + 2.", "I add.")
    assert [(c.name, json.loads(c.arguments)) for c in answer.tool_calls] == [("add", {"a": 2, "b": 2})]
    answer = read(harmony_answer(thought, thought, final))
    assert answer.content == "Four, or <b>4</b>."
    assert read(final + "<|return|>").content == "Four, or <b>4</b>."


def test_a_call_in_harmony_that_is_cut_off_is_one_that_broke() -> None:
    text = '<|channel|>commentary to=functions.add <|message|>{"a": 2, "b'
    answer = parse(text, "gpt-oss", "gpt-oss")
    assert not answer.tool_calls
    assert '{"a": 2, "b' in answer.content
