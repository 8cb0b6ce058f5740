"""gpt-oss's harmony: an answer is messages, each of a channel, behind a header of special tokens.

Thoughts are in the channel `analysis`, calls are messages to `functions.NAME`, everything else is content.
"""

from __future__ import annotations

import re

from lmdeploy_jax.text.parsers.block import Block, Call, Reading, ReasoningFormat, ToolFormat
from lmdeploy_jax.text.parsers.json_formats import read_object

_START, _CHANNEL, _MESSAGE, _CONSTRAIN = "<|start|>", "<|channel|>", "<|message|>", "<|constrain|>"
_END, _RETURN, _CALL = "<|end|>", "<|return|>", "<|call|>"
_RECIPIENT = re.compile(r"to=(?:functions\.)?([^\s<]+)")


def _read(block: Block) -> Reading[None]:
    """A mark between messages, or a header, and the call behind a header that names a function."""
    if block.tag in (_END, _RETURN, _CALL):
        yield from block.peek()
        block.commit()
        return
    header = yield from block.take_while(lambda char: char != "<")
    if block.tag != _START or _RECIPIENT.search(header):
        header += yield from _to_message(block)
    if (found := _RECIPIENT.search(header)) is None:
        block.commit()
        return
    block.begun = True
    yield from block.space()
    yield from read_object(block, Call(block, found[1]))
    yield from block.space()
    if (yield from block.peek()):
        yield from block.one_of(_CALL, _END)
    block.commit()


def _to_message(block: Block) -> Reading[str]:
    """The rest of a header."""
    text = ""
    while (yield from block.one_of(_MESSAGE, _CONSTRAIN, _CHANNEL)) != _MESSAGE:
        text += " " + (yield from block.take_while(lambda char: char != "<"))
    return text


HARMONY = ToolFormat(
    (_START, f"{_CHANNEL}final", f"{_CHANNEL}commentary", _END, _RETURN, _CALL),
    _read,
    special_tokens=(_START, _CHANNEL, _MESSAGE, _CONSTRAIN, _END, _RETURN, _CALL),
    frames=True,
)
HARMONY_THOUGHT = ReasoningFormat(f"{_CHANNEL}analysis{_MESSAGE}", _END)
