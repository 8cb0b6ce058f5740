"""Custom tools, OpenAI's name for those that take a text: a model sees functions of one parameter."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lmdeploy_jax.text.parsers.json_scan import JsonScanner
from lmdeploy_jax.text.template_arguments import Tool

INPUT = "input"  # the one parameter
_SCHEMA = {
    "type": "object",
    "properties": {INPUT: {"type": "string"}},
    "required": [INPUT],
    "additionalProperties": False,
}


def custom_function(name: str, description: str | None, grammar: Mapping[str, Any] | None) -> Tool:
    """The tool as a function. grammar: of its input, with a `syntax` and a `definition`, which are told."""
    notes = [description or ""]
    if grammar:
        told = f"The input follows this {grammar.get('syntax', '')} grammar:\n{grammar.get('definition', '')}"
        notes.append(told)
    text = "\n".join(filter(None, notes))
    return {"type": "function", "function": {"name": name, "description": text, "parameters": _SCHEMA}}


def input_of(arguments: str) -> str:
    """The text that the tool is called with; all of the arguments where they are not whole."""
    try:
        value = json.loads(arguments)[INPUT]
    except (ValueError, KeyError, TypeError):
        return arguments
    return value if isinstance(value, str) else arguments


class InputReader:
    """Reads the arguments of a call as they come."""

    def __init__(self) -> None:
        self._scanner = JsonScanner()
        self._read: list[str] = []

    def add(self, arguments: str) -> str:
        """The input, once the arguments are whole; "" before."""
        self._read.append(arguments)
        whole = all(map(self._scanner.push, arguments)) and self._scanner.complete
        return input_of("".join(self._read)) if whole else ""
