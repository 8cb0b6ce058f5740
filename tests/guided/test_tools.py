"""Whatever a model draws, an enforced call is one that our own parsers read and that fits the schema."""

from __future__ import annotations

import json
import random
import shutil
from functools import cache
from pathlib import Path

import jsonschema
import pytest
import tokenizers

from lmdeploy_jax.assets import TINY_CHAT
from lmdeploy_jax.errors import RequestError
from lmdeploy_jax.guided import Grammars, after_reasoning, tool_grammar
from lmdeploy_jax.text.parsers import (
    AnswerParser,
    ParsedAnswer,
    ReasoningFormat,
    collect,
    reasoning_format,
    register_tool_format,
    tool_format,
    tool_format_names,
)
from lmdeploy_jax.text.tokenizer import Tokenizer
from tests.guided.walks import allowed, text_of, walk

WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 8},
        "unit": {"enum": ["celsius", "fahren/heit"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 14},
        "at": {"$ref": "#/$defs/point"},
        "note": {"type": ["string", "null"], "maxLength": 4},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
    "$defs": {
        "point": {
            "type": "array",
            "items": {"type": "number", "minimum": -90, "maximum": 90},
            "minItems": 2,
            "maxItems": 2,
        }
    },
}
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "description": "…", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "now"}},
]
SCHEMAS = {"get_weather": WEATHER, "now": {"type": "object", "maxProperties": 0}}
FORMATS = [
    "qwen",
    "llama3",
    "internlm",
    "mistral",
    "deepseek-v3",
    "glm4",
    "qwen3coder",
    "kimi_k2",
    "minimax_m2",
    "deepseek-v32",
    "gemma4",
    "pythonic",
    "gpt-oss",
]
THINK = reasoning_format("default")


@pytest.fixture(scope="module")
def plain() -> Tokenizer:
    """A vocabulary that knows the tags of tool calls as ordinary text."""
    return Tokenizer(TINY_CHAT)


@pytest.fixture(scope="module")
def special(tmp_path_factory) -> Tokenizer:
    """A vocabulary where every tag is a special token."""
    folder = Path(shutil.copytree(TINY_CHAT, tmp_path_factory.mktemp("special") / "model"))
    inner = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tags = {tag for name in FORMATS for tag in tool_format(name).special_tokens} - {
        "<tool_call>",
        "</tool_call>",
    }
    inner.add_special_tokens([tokenizers.AddedToken(tag, special=True) for tag in sorted(tags)])
    inner.save(str(folder / "tokenizer.json"))
    return Tokenizer(folder)


@cache
def grammars_of(tokenizer: Tokenizer) -> Grammars:
    return Grammars(tokenizer, len(tokenizer) + 3)  # a model's vocabulary is often padded


def answers(
    tokenizer: Tokenizer, style: str, count: int, thinks: ReasoningFormat | None = None, **options: object
) -> list[ParsedAnswer]:
    grammars = grammars_of(tokenizer)
    form = tool_grammar(tool_format(style), TOOLS, tokenizer, reasoning=thinks, **options)
    grammar = grammars.compile(form)
    started = bool(options.get("starts_in_reasoning"))
    parsed = []
    for seed in range(count):
        ids = walk(grammar, tokenizer, len(tokenizer) + 3, random.Random(f"{style}/{seed}"))
        parser = AnswerParser(thinks, tool_format(style), SCHEMAS, started)
        parsed.append(collect(parser.feed(text_of(ids, tokenizer)) + parser.finish()))
    return parsed


def check(answer: ParsedAnswer) -> None:
    assert not answer.content
    assert answer.tool_calls
    for call in answer.tool_calls:
        jsonschema.validate(json.loads(call.arguments), SCHEMAS[call.name])


@pytest.mark.parametrize("vocabulary", ["plain", "special"])
@pytest.mark.parametrize("name", FORMATS)
def test_required_calls_parse_and_fit_their_schemas(name, vocabulary, request):
    found = answers(request.getfixturevalue(vocabulary), name, 12)
    for answer in found:
        check(answer)
    assert {call.name for answer in found for call in answer.tool_calls} == {"get_weather", "now"}
    assert max(len(answer.tool_calls) for answer in found) > 1


@pytest.mark.parametrize("name", FORMATS)
def test_a_named_tool_is_called_once_where_calls_are_not_parallel(name, special):
    for answer in answers(special, name, 6, name="get_weather", parallel=False):
        check(answer)
        assert [call.name for call in answer.tool_calls] == ["get_weather"]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("started", [True, False])
def test_reasoning_may_come_first(name, started, special):
    found = answers(special, name, 24, THINK, starts_in_reasoning=started)
    for answer in found:
        check(answer)
    thoughts = [bool(answer.reasoning) for answer in found]
    assert any(thoughts)
    assert started or not all(thoughts)


@pytest.mark.parametrize("form", ["call", "choice"])
def test_reasoning_that_is_forbidden_is_not_offered_and_ends_at_once(form, plain):
    grammars, stop = Grammars(plain, len(plain)), [plain.eos_token_id]

    def spelled(started: bool, forbidden: bool) -> set[str]:
        """How an answer may begin."""
        if form == "call":
            options = {"starts_in_reasoning": started, "reasoning_forbidden": forbidden}
            given = tool_grammar(tool_format("qwen"), TOOLS, plain, reasoning=THINK, **options)
        else:
            choice = {"type": "choice", "choice": ["yes"]}
            given = after_reasoning(choice, plain, THINK, started, forbidden)
        ids = allowed(grammars.compile(given).matcher(stop), len(plain))
        return {plain.token_text(i) for i in ids}

    assert "<think>" in spelled(started=False, forbidden=False)
    assert "<think>" not in spelled(started=False, forbidden=True)
    assert {"h", "</think>"} <= spelled(started=True, forbidden=False)
    assert all("</think>".startswith(text) for text in spelled(started=True, forbidden=True))


def tool(parameters: dict, strict: bool = True) -> list[dict]:
    return [{"type": "function", "function": {"name": "f", "parameters": parameters, "strict": strict}}]


def one(**schema: object) -> list[dict]:
    return tool({"type": "object", "properties": {"x": schema}, "required": ["x"]})


@pytest.mark.parametrize(
    ("name", "tools", "message"),
    [
        ("qwen", [], "a call is required, but the tools are: none at all"),
        ("qwen", [{"function": {"name": "two words"}}], "no function with a usable name"),
        ("qwen", tool({"type": "array"}), "the schema of an object"),
        ("glm4", one(type="string", pattern="a+"), "parameter 'x' of 'f' cannot be enforced.*pattern"),
        ("qwen3coder", one(enum=["a</parameter>"]), "a value with </parameter>"),
        ("qwen3coder", tool({"properties": {"<x>": {}}}), "its name"),
        ("glm4", tool({"properties": {}, "required": ["y"]}), "required 'y'"),
        ("glm4", tool({"properties": {}, "minProperties": 1}), "minProperties"),
    ],
)
def test_what_cannot_be_enforced_is_refused(name, tools, message, plain):
    with pytest.raises(RequestError, match=message):
        tool_grammar(tool_format(name), tools, plain)


@pytest.mark.parametrize("name", ["qwen", "glm4"])
def test_a_tool_that_is_not_strict_does_without_what_cannot_be_enforced(name, plain):
    x = {"type": "array", "items": {"type": "string", "maxLength": 3}, "uniqueItems": True, "maxItems": 2}
    y = {"type": "string", "format": "unheard-of", "maxLength": 5}
    parameters = {"type": "object", "properties": {"x": x, "y": y}, "required": ["x", "y"]}
    grammars = grammars_of(plain)
    with pytest.raises(RequestError, match=r"uniqueItems|format"):
        grammars.compile(tool_grammar(tool_format(name), tool(parameters), plain))
    form = tool_grammar(tool_format(name), tool(parameters | {"additionalProperties": False}, False), plain)
    grammar = grammars.compile(form)
    for seed in range(5):
        text = text_of(walk(grammar, plain, len(plain), random.Random(seed)), plain)
        parser = AnswerParser(None, tool_format(name), {"f": parameters})
        answer = collect(parser.feed(text) + parser.finish())
        assert all(len(json.loads(call.arguments)["y"]) <= 5 for call in answer.tool_calls)


def test_an_unknown_tool_is_refused_by_name(plain):
    with pytest.raises(RequestError, match="'later' must be called, but the tools are: get_weather, now"):
        tool_grammar(tool_format("qwen"), TOOLS, plain, name="later")


def test_a_format_of_ones_own_has_no_grammar(plain):
    if "guided-test" not in tool_format_names():
        from lmdeploy_jax.text.parsers import ToolFormat

        register_tool_format("guided-test", lambda: ToolFormat(("<call>",), lambda block: block.close("x")))
    with pytest.raises(RequestError, match="no grammar; use 'auto'"):
        tool_grammar(tool_format("guided-test"), TOOLS, plain)


def begun(grammar, tokenizer, text: str) -> list[int]:
    """How a model says something in a grammar that allows it: token by token, where there are such tokens."""
    ids = tokenizer.encode(text, add_bos=False, add_special_tokens=False)
    matcher = grammar.matcher([tokenizer.eos_token_id])
    for i in ids:
        matcher.advance(i)
    return ids


STRICT = {"function": TOOLS[0]["function"] | {"strict": True}}
LOOSE = {"function": {"name": "now", "parameters": {"type": "int"}}}
LOOSE_CALLS = {
    "qwen3coder": "<tool_call>\n<function=now>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>",
    "glm4": "<tool_call>now\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n</tool_call>",
    "minimax_m2": '<minimax:tool_call>\n<invoke name="now">\n<parameter name="a">1</parameter>\n</invoke>\n'
    "</minimax:tool_call>",
    "deepseek-v32": '<｜DSML｜function_calls>\n<｜DSML｜invoke name="now">\n'
    '<｜DSML｜parameter name="a" string="true">1</｜DSML｜parameter>\n</｜DSML｜invoke>\n'
    "</｜DSML｜function_calls>",
    "pythonic": "<|python_start|>[now(a=')')]<|python_end|>",
    "gemma4": "<|tool_call>call:now{a:1}<tool_call|>",
}


@pytest.mark.parametrize("name", LOOSE_CALLS)
def test_arguments_for_a_tool_that_is_not_strict_are_the_models_own(name, plain):
    style = tool_format(name)
    grammar = grammars_of(plain).compile(tool_grammar(style, [STRICT, LOOSE], plain, required=False))
    text = text_of(begun(grammar, plain, f"Well.\n{LOOSE_CALLS[name]}\nSo."), plain)
    parser = AnswerParser(None, style, SCHEMAS)
    answer = collect(parser.feed(text) + parser.finish())
    assert [call.name for call in answer.tool_calls] == ["now"]
    with pytest.raises(RequestError, match="not in the answer's grammar"):
        begun(grammar, plain, f"Well.\n{LOOSE_CALLS[name].replace('now', 'later')}")


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        (
            "qwen",
            '<tool_call>\n{"name": "f", "arguments": {"x": [',
            '<tool_call>\n{"name": "f", "arguments": {"x": {',
        ),
        (
            "glm4",
            "<tool_call>f\n<arg_key>x</arg_key>\n<arg_value>[",
            "<tool_call>f\n<arg_key>x</arg_key>\n<arg_value>{",
        ),
    ],
)
def test_a_call_of_the_models_choice_is_held_to_what_can_be_enforced(name, good, bad, plain):
    x = {"type": "array", "items": {"type": "integer"}, "uniqueItems": True}
    y = {"type": "string", "pattern": "a+", "format": "unheard-of"}
    tools = tool({"type": "object", "properties": {"x": x, "y": y}, "required": ["x", "y"]})
    grammar = grammars_of(plain).compile(tool_grammar(tool_format(name), tools, plain, required=False))
    begun(grammar, plain, good)
    with pytest.raises(RequestError, match="not in the answer's grammar"):
        begun(grammar, plain, bad)


@pytest.mark.parametrize("vocabulary", ["plain", "special"])
@pytest.mark.parametrize("name", [name for name in FORMATS if not tool_format(name).frames])
def test_a_call_that_is_begun_amid_talk_is_one_of_a_tool_and_fits_where_it_is_strict(
    name, vocabulary, request
):
    tokenizer, style = request.getfixturevalue(vocabulary), tool_format(name)
    tools = [STRICT] if name in LOOSE_CALLS else [STRICT, LOOSE]
    grammar = grammars_of(tokenizer).compile(tool_grammar(style, tools, tokenizer, required=False))
    stop = tokenizer.eos_token_id
    assert stop in allowed(grammar.matcher([stop]), len(tokenizer)), "it may say nothing"
    lead = f"Let me see, {{x}} < 3.\n{style.open_tags[0]}"
    called = set()
    for seed in range(8):
        matcher, ids = grammar.matcher([stop]), begun(grammar, tokenizer, lead)
        for i in ids:
            matcher.advance(i)
        assert stop not in allowed(matcher, len(tokenizer)), "a call that is begun is ended"
        ids += walk(grammar, tokenizer, len(tokenizer) + 3, random.Random(seed), ids)
        parser = AnswerParser(None, style, SCHEMAS)
        answer = collect(parser.feed(text_of(ids, tokenizer)) + parser.finish())
        assert answer.content.startswith("Let me see, {x} < 3.")
        calls = answer.tool_calls
        called |= {call.name for call in calls}
        for call in calls:
            if call.name == "get_weather":
                jsonschema.validate(json.loads(call.arguments), WEATHER)
    assert "get_weather" in called
    assert called <= {"get_weather", "now"}
