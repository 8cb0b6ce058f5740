"""Tool formats whose arguments are literals of a language of its own: Python's, Gemma 4's."""

from __future__ import annotations

import ast
import json
import re
from typing import Any

from lmdeploy_jax.text.parsers.block import Block, Call, Reading, ReasoningFormat, ToolFormat, ViolationError
from lmdeploy_jax.text.parsers.json_scan import JsonScanner
from lmdeploy_jax.text.parsers.schema import ALL_TYPES, coerce
from lmdeploy_jax.text.stop import StopMatcher

_NOT_IN_NAMES = "<>{}[]()\"'`;,=｜"
_CLOSE = {"(": ")", "[": "]", "{": "}"}
_WORDS = {"true": True, "false": False, "null": None}
_DEEPEST = 64  # nested values, which are read by functions that call themselves

# --- Python: [f(a=1), g(b="x")] -----------------------------------------------------------------------------

_ESCAPE = re.compile(r"\\(.)", re.DOTALL)
PYTHON_TAGS = {"<|python_start|>": "<|python_end|>", "<|tool_call_start|>": "<|tool_call_end|>"}


def _read_pythonic(block: Block) -> Reading[None]:
    """A list of calls of Python functions, between tags or, of tools that exist, bare."""
    if block.tag != "[":
        yield from block.space()
        yield from block.one_of("[")
    separator = ","
    while separator == ",":
        yield from block.space()
        name = yield from block.word(_NOT_IN_NAMES)
        if block.tag == "[" and block.schemas is not None and name not in block.schemas:
            raise ViolationError
        yield from block.space()
        yield from block.one_of("(")
        block.begun = True
        yield from _read_arguments(block, Call(block, name))
        yield from block.space()
        separator = yield from block.one_of(",", "]")
    block.commit()
    if block.tag in PYTHON_TAGS:
        yield from block.close(PYTHON_TAGS[block.tag])


def _read_arguments(block: Block, call: Call) -> Reading[None]:
    """Arguments by name behind the bracket that opens them, as one JSON object; a comma may end them."""
    before, separator = "{", ","
    while separator == ",":
        yield from block.space()
        if (yield from block.peek()) == ")":
            yield from block.take()
            break
        key = yield from block.word(_NOT_IN_NAMES)
        yield from block.space()
        yield from block.one_of("=")
        value = _as_json((yield from _python_text(block)))
        call.add(f"{before}{json.dumps(key, ensure_ascii=False)}: {value}")
        before = ", "
        separator = yield from block.one_of(",", ")")
    call.add("}" if call.has_arguments else "{}")


def _python_text(block: Block) -> Reading[str]:
    """A value up to the comma or bracket that ends it."""
    text, owed, quote = "", [")"], ""
    while True:
        char = yield from block.peek()
        if not quote and (char == owed[-1] or (char == "," and len(owed) == 1)):
            if len(owed) == 1:
                return text
            owed.pop()
        elif not quote and char in _CLOSE:
            if len(owed) == _DEEPEST:
                raise ViolationError
            owed.append(_CLOSE[char])
        elif quote and char == "\\":
            text += yield from block.take()
        elif char and char in "\"'":
            quote = "" if quote == char else quote or char
        text += yield from block.take()


def _as_json(text: str) -> str:
    """JSON as it is, which escapes in its own way, and a Python literal as JSON."""
    own = text.strip()
    try:
        json.loads(own, parse_constant=_refuse)
    except (ValueError, RecursionError):
        pass
    else:
        return own
    try:
        value = _value_of(ast.parse(_ESCAPE.sub(_as_python_has_it, own), mode="eval").body)
        found = json.dumps(value, ensure_ascii=False, allow_nan=False)
        found.encode()  # half of a surrogate pair is no text
    except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
        raise ViolationError from error
    return found


def _as_python_has_it(escape: re.Match[str]) -> str:
    """A backslash that escapes nothing is one, as for Python, which warns of it."""
    return escape[0] if escape[1] in "\n\\'\"abfnrtv0xNuU" else "\\" + escape[0]


def _refuse(constant: str) -> None:
    raise ValueError(constant)


def _value_of(node: ast.expr) -> Any:
    match node:
        case ast.Constant(str() | int() | float() | None as value):
            return value
        case ast.Name(id) if id in _WORDS:
            return _WORDS[id]
        case ast.UnaryOp(ast.USub(), ast.Constant(int() | float() as value)):
            return -value
        case ast.List(elements) | ast.Tuple(elements):
            return [_value_of(element) for element in elements]
        case ast.Dict(keys, values):
            pairs = zip(keys, values, strict=True)
            return {_text_of(key): _value_of(value) for key, value in pairs}
    raise ValueError(node)


def _text_of(key: ast.expr | None) -> str:
    if isinstance(key, ast.Constant) and isinstance(key.value, str):
        return key.value
    raise ValueError(key)


# --- Gemma 4: call:f{a:1,b:<|"|>x<|"|>} ---------------------------------------------------------------------

_QUOTE = '<|"|>'


def _read_gemma4(block: Block) -> Reading[None]:
    yield from block.space()
    yield from block.one_of("call:")
    call = Call(block, (yield from block.word(_NOT_IN_NAMES)))
    yield from block.one_of("{")
    before, separator = "{", ","
    while separator == ",":
        key = yield from _gemma4_key(block)
        if key is None:
            yield from block.one_of("}")
            break
        call.add(f"{before}{key}: {(yield from _gemma4_value(block, 0))}")
        before = ", "
        separator = yield from block.one_of(",", "}")
    call.add("}" if call.has_arguments else "{}")
    yield from block.close("<tool_call|>")


def _gemma4_key(block: Block) -> Reading[str | None]:
    """A key's JSON text with its colon behind it; None where the object ends."""
    yield from block.space()
    char = yield from block.peek()
    if char == "}":
        return None
    if char and char in '<"':
        key = yield from _gemma4_string(block)
    else:
        bare = yield from block.take_while(lambda char: char not in ':{}[],"<')
        if not bare.strip():
            raise ViolationError
        key = json.dumps(bare.strip(), ensure_ascii=False)
    yield from block.space()
    yield from block.one_of(":")
    return key


def _gemma4_value(block: Block, depth: int) -> Reading[str]:
    """A value's JSON text, and the space around it."""
    yield from block.space()
    char = yield from block.peek()
    if depth == _DEEPEST or not char:
        raise ViolationError
    if char in "{[":
        value = yield from _gemma4_items(block, char, depth + 1)
    elif char in '<"':
        value = yield from _gemma4_string(block)
    else:
        text = (yield from block.take_while(lambda char: char not in ",]}{[<")).strip()
        if not text:
            raise ViolationError
        value = coerce(text, ALL_TYPES)
    yield from block.space()
    return value


def _gemma4_items(block: Block, open: str, depth: int) -> Reading[str]:
    close, items, separator = _CLOSE[open], list[str](), ","
    yield from block.take()
    while separator == ",":
        yield from block.space()
        if (yield from block.peek()) == close:
            yield from block.take()
            break
        key = (yield from _gemma4_key(block)) if open == "{" else None
        value = yield from _gemma4_value(block, depth)
        items.append(value if key is None else f"{key}: {value}")
        separator = yield from block.one_of(",", close)
    return open + ", ".join(items) + close


def _gemma4_string(block: Block) -> Reading[str]:
    """The JSON text of a string, which some write as JSON has it."""
    if (yield from block.peek()) == '"':
        scanner, text = JsonScanner(), ""
        while not scanner.complete:
            text += yield from block.json(scanner)
        return text
    yield from block.one_of(_QUOTE)
    matcher, text, stop = StopMatcher((_QUOTE,)), "", None
    while stop is None:
        shown, stop = matcher.feed((yield from block.take()))
        text += shown
    return json.dumps(text, ensure_ascii=False)


PYTHONIC = ToolFormat(
    tuple(PYTHON_TAGS),
    _read_pythonic,
    edge_tags=("[",),
    special_tokens=(*PYTHON_TAGS, *PYTHON_TAGS.values()),
)
GEMMA4 = ToolFormat(("<|tool_call>",), _read_gemma4, special_tokens=("<|tool_call>", _QUOTE, "<tool_call|>"))
GEMMA4_THOUGHT = ReasoningFormat("<|channel>thought", "<channel|>", gap="")
