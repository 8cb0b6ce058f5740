"""Tool formats whose parameters are tagged texts: values become JSON by the tool's schema."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lmdeploy_jax.text.parsers.block import Block, Call, Reading, ToolFormat, ViolationError
from lmdeploy_jax.text.parsers.schema import ALL_TYPES, coerce, value_types
from lmdeploy_jax.text.stop import StopMatcher

_NOT_IN_NAMES = "<>{}[]\"'`"


@dataclass(frozen=True)
class _Tags:
    """The marks around a parameter's name and value, and after the last parameter."""

    name: str
    name_end: str
    value: str
    value_end: tuple[str, ...]
    end: str
    newline_first: bool  # whether a value's first newline belongs to the format
    not_in_keys: str = "<>\n"


_QWEN3CODER = _Tags("<parameter=", ">", "", ("</parameter>", "\n</parameter>"), "</function>", True)
_MINIMAX_M2 = _Tags('<parameter name="', '">', "", ("</parameter>",), "</invoke>", False, '<>\n"')
_DSML = "｜DSML｜"
_DSML_TAGS = _Tags("", "", "", (f"</{_DSML}parameter>",), "", False)
_GLM4 = _Tags("<arg_key>", "</arg_key>", "<arg_value>", ("</arg_value>",), "</tool_call>", False)


def _read_parameters(block: Block, call: Call, tags: _Tags) -> Reading[None]:
    """All parameters up to the end tag, as one JSON object."""
    schema = (block.schemas or {}).get(call.name or "", {})
    before = "{"
    yield from block.space()
    while (yield from block.one_of(tags.name, tags.end)) == tags.name:
        key = yield from block.take_while(lambda char: char not in tags.not_in_keys)
        if not key:
            raise ViolationError
        yield from block.one_of(tags.name_end)
        if tags.value:
            yield from block.space()
            yield from block.one_of(tags.value)
        if tags.newline_first and (yield from block.peek()) == "\n":
            yield from block.take()
        yield from _read_value(
            block, call, tags, f"{before}{json.dumps(key, ensure_ascii=False)}: ", schema, key
        )
        before = ", "
        yield from block.space()
    call.add("}" if call.has_arguments else "{}")


def _read_value(
    block: Block, call: Call, tags: _Tags, label: str, schema: Mapping[str, Any], key: str
) -> Reading[None]:
    yield from _read_typed(block, call, tags, label, value_types(schema, key))


def _read_typed(block: Block, call: Call, tags: _Tags, label: str, types: frozenset[str]) -> Reading[None]:
    if types == {"string"}:
        call.add(label + '"')
        yield from _stream_string(block, call, tags)
        call.add('"')
        return
    matcher, text, stop = StopMatcher(tags.value_end), "", None
    while stop is None:
        shown, stop = matcher.feed((yield from block.take()))
        text += shown
    call.add(label + coerce(text, types))


def _stream_string(block: Block, call: Call, tags: _Tags) -> Reading[None]:
    """The value up to its end tag, as the inside of a JSON string; what may be the end tag is held back."""
    matcher, held, stop = StopMatcher(tags.value_end), 0, None
    while stop is None:
        shown, stop = matcher.feed((yield from block.take()))
        held += 1 - len(shown)
        if shown:
            call.add(json.dumps(shown, ensure_ascii=False)[1:-1], keep=held)


def _read_qwen3coder(block: Block) -> Reading[None]:
    yield from block.space()
    yield from block.one_of("<function=")
    call = Call(block, (yield from block.word(_NOT_IN_NAMES)))
    yield from block.one_of(">")
    yield from _read_parameters(block, call, _QWEN3CODER)
    yield from block.close("</tool_call>")


def _read_minimax_m2(block: Block) -> Reading[None]:
    begin, end = '<invoke name="', "</minimax:tool_call>"
    yield from block.space()
    tag = yield from block.one_of(begin)
    while tag == begin:
        block.begun = True
        call = Call(block, (yield from block.word(_NOT_IN_NAMES)))
        yield from block.one_of('">')
        yield from _read_parameters(block, call, _MINIMAX_M2)
        yield from block.space()
        tag = yield from block.one_of(begin, end)
    block.commit()


def _read_dsml(block: Block) -> Reading[None]:
    """DeepSeek V3.2 and V4: calls in one block, parameters that say whether they are texts or JSON."""
    begin, end = f'<{_DSML}invoke name="', block.tag.replace("<", "</")
    yield from block.space()
    tag = yield from block.one_of(begin)
    while tag == begin:
        block.begun = True
        call = Call(block, (yield from block.word(_NOT_IN_NAMES)))
        yield from block.one_of('">')
        yield from _read_dsml_parameters(block, call)
        yield from block.space()
        tag = yield from block.one_of(begin, end)
    block.commit()


def _read_dsml_parameters(block: Block, call: Call) -> Reading[None]:
    before, begin = "{", f'<{_DSML}parameter name="'
    yield from block.space()
    while (yield from block.one_of(begin, f"</{_DSML}invoke>")) == begin:
        key = yield from block.take_while(lambda char: char not in '<>"\n')
        if not key:
            raise ViolationError
        yield from block.one_of('" string="')
        is_text = (yield from block.one_of('true">', 'false">')) == 'true">'
        label = f"{before}{json.dumps(key, ensure_ascii=False)}: "
        types = frozenset({"string"}) if is_text else ALL_TYPES
        yield from _read_typed(block, call, _DSML_TAGS, label, types)
        before = ", "
        yield from block.space()
    call.add("}" if call.has_arguments else "{}")


def _read_glm4(block: Block) -> Reading[None]:
    yield from block.space()
    call = Call(block, (yield from block.word(_NOT_IN_NAMES)))
    yield from _read_parameters(block, call, _GLM4)


QWEN3CODER = ToolFormat(("<tool_call>",), _read_qwen3coder)
GLM4 = ToolFormat(
    ("<tool_call>",),
    _read_glm4,
    special_tokens=("<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
)
MINIMAX_M2 = ToolFormat(
    ("<minimax:tool_call>",),
    _read_minimax_m2,
    special_tokens=("<minimax:tool_call>", "</minimax:tool_call>"),
)
DSML = ToolFormat((f"<{_DSML}function_calls>", f"<{_DSML}tool_calls>"), _read_dsml, special_tokens=(_DSML,))
