"""A script that speaks for a model in tests with clients: it adds, with a tool where one is offered."""

from __future__ import annotations

import json
import re

from lmdeploy_jax.engine.request import Request
from tests.scripted import TOKENIZER, ids

QUESTION, SENTENCE, FORM = "What is 12 + 30?", "It is 42.", '{"x": 42}'
ARGUMENTS = {"add": {"a": 12, "b": 30}, "final_answer": {"answer": "42"}}
SMOLAGENTS_RESULT = "Observation:\n42"  # it tells results as texts
DSPY = "[[ ##"  # its fields


def adding(request: Request, index: int) -> list[int]:
    """Calls `add` where it is offered and has not been called, else the tool that takes the result. Without
    tools it is JSON or a sentence, as the request wants.
    """
    prompt = TOKENIZER.decode(request.prompt.ids, skip_special_tokens=False)
    offered = re.findall(r'\{"name": "(\w+)"', prompt)
    called = "<tool_response>" in prompt or SMOLAGENTS_RESULT in prompt
    name = next((n for n in offered if n != "add"), None) if called or "add" not in offered else "add"
    if name is not None:
        arguments = ARGUMENTS.get(name, {"x": 42})
        return ids(f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>")
    if DSPY in prompt:
        return ids("[[ ## answer ## ]]\n42\n\n[[ ## completed ## ]]")
    wants_json = "JSON" in prompt or (request.params.grammar is not None and not offered)
    return ids(FORM if wants_json else SENTENCE)
