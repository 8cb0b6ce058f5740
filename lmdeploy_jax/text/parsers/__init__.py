"""Tool calls and reasoning in answers, parsed as they come.

    parser = AnswerParser(reasoning_format("qwen3"), tool_format("qwen3"), schemas)
    events = parser.feed(text) … + parser.finish()
    answer = collect(events)

A format of one's own is a grammar over a `Block`, registered by name:

    def read(block: Block) -> Reading[None]:  # <call>NAME {…}</call>
        call = Call(block, (yield from block.word(but="{")))
        yield from block.space()
        yield from read_object(block, call)
        yield from block.close("</call>")

    register_tool_format("mine", lambda: ToolFormat(("<call>",), read))
"""

from lmdeploy_jax.text.parsers.answer import AnswerParser
from lmdeploy_jax.text.parsers.block import Block, Call, Reading, ReasoningFormat, ToolFormat, ViolationError
from lmdeploy_jax.text.parsers.events import (
    ContentDelta,
    Event,
    ParsedAnswer,
    ReasoningDelta,
    ToolCall,
    ToolCallArguments,
    ToolCallBroken,
    ToolCallStart,
    collect,
)
from lmdeploy_jax.text.parsers.json_formats import read_object
from lmdeploy_jax.text.parsers.registry import (
    reasoning_format,
    reasoning_format_names,
    register_reasoning_format,
    register_tool_format,
    tool_format,
    tool_format_names,
)

__all__ = [
    "AnswerParser",
    "Block",
    "Call",
    "ContentDelta",
    "Event",
    "ParsedAnswer",
    "Reading",
    "ReasoningDelta",
    "ReasoningFormat",
    "ToolCall",
    "ToolCallArguments",
    "ToolCallBroken",
    "ToolCallStart",
    "ToolFormat",
    "ViolationError",
    "collect",
    "read_object",
    "reasoning_format",
    "reasoning_format_names",
    "register_reasoning_format",
    "register_tool_format",
    "tool_format",
    "tool_format_names",
]
