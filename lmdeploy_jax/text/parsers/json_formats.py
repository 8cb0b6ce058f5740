"""Tool formats whose calls are JSON: the arguments are passed on as the model's own text."""

from __future__ import annotations

import json

from lmdeploy_jax.text.parsers.block import Block, Call, Reading, ToolFormat, ViolationError
from lmdeploy_jax.text.parsers.json_scan import JsonScanner

_ARGUMENT_KEYS = ("arguments", "parameters")
_BARE_KEYS = ("name", "type", *_ARGUMENT_KEYS)
_NOT_IN_NAMES = "<>{}[]\"'`;,｜"


def read_object(block: Block, call: Call) -> Reading[None]:
    """The arguments as a JSON object."""
    scanner = JsonScanner()
    if (yield from block.peek()) != "{":
        raise ViolationError
    while not scanner.complete:
        call.add((yield from block.json(scanner)))


def _read_quoted_object(block: Block, call: Call) -> Reading[None]:
    """The arguments as a JSON string that holds the object's text."""
    outer, inner = JsonScanner(), JsonScanner()
    yield from block.json(outer)
    while text := (yield from _string_piece(block, outer)):
        if (not call.has_arguments and text != "{") or not all(map(inner.push, text)):
            raise ViolationError
        call.add(text)
    if not inner.complete:
        raise ViolationError
    call.add("")  # the closing quote is expressed too


def _string_piece(block: Block, scanner: JsonScanner) -> Reading[str]:
    """What the next character or escape of a JSON string stands for; "" for the closing quote."""
    raw = yield from block.json(scanner)
    if scanner.complete:
        return ""
    if raw == "\\":
        raw += yield from block.json(scanner)
        for _ in range(4 if raw == "\\u" else 0):
            raw += yield from block.json(scanner)
    piece: str = json.loads(f'"{raw}"')
    # Half of a surrogate pair is no text by itself, but as an escape it means the same in the inner JSON.
    return raw if _is_surrogate(piece) else piece


def _is_surrogate(text: str) -> bool:
    return any("\ud800" <= char <= "\udfff" for char in text)


def _read_string(block: Block) -> Reading[str]:
    scanner = JsonScanner()
    if (yield from block.peek()) != '"':
        raise ViolationError
    raw = ""
    while not scanner.complete:
        raw += yield from block.json(scanner)
    text: str = json.loads(raw)
    if _is_surrogate(text):
        raise ViolationError
    return text


def _skip_value(block: Block) -> Reading[None]:
    scanner = JsonScanner()
    while (char := (yield from block.peek())) and scanner.push(char):
        yield from block.take()
    if not scanner.complete:
        raise ViolationError


def read_call(block: Block, bare: bool = False) -> Reading[None]:
    """`{"name": …, "arguments": {…}}` after its first brace, its keys in any order.

    Without arguments the call has `{}`. A bare one must look like nothing but a call: only a call's keys, the
    arguments among them, and the name of a tool that exists.
    """
    call = Call(block)
    separator = ","
    while separator == ",":
        yield from block.space()
        key = yield from _read_string(block)
        if bare and key not in _BARE_KEYS:
            raise ViolationError
        yield from block.space()
        yield from block.one_of(":")
        yield from block.space()
        yield from _read_member(block, call, key, bare)
        yield from block.space()
        separator = yield from block.one_of(",", "}")
    if call.name is None or (bare and not call.has_arguments):
        raise ViolationError
    if not call.has_arguments:
        call.add("{}")
    block.commit()


def _read_member(block: Block, call: Call, key: str, bare: bool) -> Reading[None]:
    if key == "name" and call.name is None:
        name = yield from _read_string(block)
        if not name or (bare and block.schemas is not None and name not in block.schemas):
            raise ViolationError
        call.named(name)
    elif key in _ARGUMENT_KEYS and not call.has_arguments:
        quoted = (yield from block.peek()) == '"'
        yield from (_read_quoted_object if quoted else read_object)(block, call)
    else:
        yield from _skip_value(block)


def _read_qwen(block: Block) -> Reading[None]:
    yield from block.space()
    yield from block.one_of("{")
    yield from read_call(block)
    yield from block.close("</tool_call>")


def _read_internlm(block: Block) -> Reading[None]:
    yield from block.space()
    yield from block.one_of("<|plugin|>")
    yield from block.space()
    yield from block.one_of("{")
    yield from read_call(block)
    yield from block.close("<|action_end|>")


def _read_llama3(block: Block) -> Reading[None]:
    """Calls separated by semicolons, without an end mark."""
    bare = block.tag == "{"
    if not bare:
        yield from block.space()
        yield from block.one_of("{")
    yield from read_call(block, bare)
    while True:
        yield from block.space()
        yield from block.one_of(";")
        yield from block.space()
        yield from block.one_of("{")
        block.begun = True
        yield from read_call(block, bare)


def _read_mistral(block: Block) -> Reading[None]:
    yield from block.space()
    if (yield from block.peek()) == "[":
        yield from _read_call_list(block)
        return
    call = Call(block, (yield from block.word(_NOT_IN_NAMES)))
    yield from block.space()
    while (yield from block.peek()) == "[":
        mark = yield from block.one_of("[ARGS]", "[CALL_ID]")
        yield from block.space()
        if mark == "[CALL_ID]":
            yield from block.word(_NOT_IN_NAMES)
    yield from read_object(block, call)


def _read_call_list(block: Block) -> Reading[None]:
    yield from block.one_of("[")
    separator = ","
    while separator == ",":
        yield from block.space()
        yield from block.one_of("{")
        block.begun = True
        yield from read_call(block)
        yield from block.space()
        separator = yield from block.one_of(",", "]")
    block.commit()


_CALL_BEGIN, _SEP, _CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
_CALLS_BEGIN, _CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"


def _read_deepseek_v3(block: Block) -> Reading[None]:
    yield from block.space()
    tag = yield from block.one_of(_CALL_BEGIN)
    while tag == _CALL_BEGIN:
        block.begun = True
        yield from _read_deepseek_call(block)
        yield from block.space()
        tag = yield from block.one_of(_CALL_BEGIN, _CALLS_END)
    block.commit()


def _read_deepseek_call(block: Block) -> Reading[None]:
    """V3 and R1: `function`, the name, the arguments in a fence. V3.1: the name, the arguments."""
    name = yield from block.word(_NOT_IN_NAMES)
    yield from block.one_of(_SEP)
    fenced = (yield from block.peek()) != "{"
    if fenced:
        name = yield from block.word(_NOT_IN_NAMES)
        yield from block.space()
        yield from block.one_of("```json")
        yield from block.space()
    yield from read_object(block, Call(block, name))
    if fenced:
        yield from block.close("```")
    yield from block.close(_CALL_END)


_KIMI_CALLS = ("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>")
_KIMI_CALL = ("<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>")


def _read_kimi_k2(block: Block) -> Reading[None]:
    yield from block.space()
    tag = yield from block.one_of(_KIMI_CALL[0])
    while tag == _KIMI_CALL[0]:
        block.begun = True
        yield from block.space()
        name = _name_in_id((yield from block.word(_NOT_IN_NAMES)))
        yield from block.space()
        yield from block.one_of(_KIMI_CALL[1])
        yield from block.space()
        yield from read_object(block, Call(block, name))
        yield from block.close(_KIMI_CALL[2])
        yield from block.space()
        tag = yield from block.one_of(_KIMI_CALL[0], _KIMI_CALLS[1])
    block.commit()


def _name_in_id(text: str) -> str:
    """`functions.NAME:0` is how such models number their calls."""
    name, _, number = text.removeprefix("functions.").rpartition(":")
    if not name or not number.isdecimal():
        raise ViolationError
    return name


QWEN = ToolFormat(("<tool_call>",), _read_qwen)
INTERNLM = ToolFormat(
    ("<|action_start|>",),
    _read_internlm,
    special_tokens=("<|action_start|>", "<|plugin|>", "<|action_end|>"),
)
LLAMA3 = ToolFormat(("<|python_tag|>",), _read_llama3, edge_tags=("{",), special_tokens=("<|python_tag|>",))
MISTRAL = ToolFormat(("[TOOL_CALLS]",), _read_mistral, special_tokens=("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"))
DEEPSEEK_V3 = ToolFormat(
    (_CALLS_BEGIN,),
    _read_deepseek_v3,
    special_tokens=(_CALLS_BEGIN, _CALL_BEGIN, _SEP, _CALL_END, _CALLS_END),
)
KIMI_K2 = ToolFormat((_KIMI_CALLS[0],), _read_kimi_k2, special_tokens=(*_KIMI_CALLS, *_KIMI_CALL))
