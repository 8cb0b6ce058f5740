"""Settings × forms × parsers × reasoning, drawn: what is accepted has its form, streamed and whole alike."""

from __future__ import annotations

import json
import queue
import re
from dataclasses import dataclass, field
from typing import Any

import jsonschema
from hypothesis import given
from hypothesis import strategies as st

from lmdeploy_jax import GenerationConfig, Pipeline, Response
from lmdeploy_jax.errors import ConfigError, RequestError
from lmdeploy_jax.server.chat.call import ChatCall, ToolChoice
from lmdeploy_jax.server.chat.deltas import Delta, Finish
from lmdeploy_jax.server.chat.prepare import Chat, Prepared
from lmdeploy_jax.text.conversation import normalise_messages
from lmdeploy_jax.text.parsers import ParsedAnswer, collect, reasoning_format, tool_format
from lmdeploy_jax.text.prompts import Prompt
from lmdeploy_jax.vision.access import MediaAccess
from tests.fuzz import cases, drawn
from tests.patience import PATIENCE

AT_ONCE = 10  # calls that run together, each streamed and whole
SCHEMAS: list[dict[str, Any]] = [
    {"type": "integer", "minimum": -9, "maximum": 99},
    {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    {"type": "object", "properties": {"name": {"type": "string", "maxLength": 5}, "n": {"enum": [1, None]}},
     "required": ["n"], "additionalProperties": False},
]  # fmt: skip
# Python's reading of a pattern, and llguidance's; some look like what parsers look for.
PATTERNS = [
    "[\n ]{0,4}[a-c]{1,3}\n?",
    "[A-Z][a-z]{2,5} [0-9]{3}",
    '<tool_call>\n\\{"name": "add", "arguments": \\{\\}\\}\n</tool_call>',
    '\\{"name": "add", "parameters": \\{\\}\\}',
    "(yes|no)( </think>)?",
]
TEXTS = [
    "alpha",
    " beta",
    "\n\ngamma",
    "\n",
    "<tool_call>",
    "{}",
    "a </think> b",
    "ü 😀",
    '"',
    "[TOOL_CALLS]",
]
FUNCTION = {
    "name": "add",
    "parameters": {"type": "object", "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 9}},
                   "required": ["a"], "additionalProperties": False},
}  # fmt: skip
TOOL = {"type": "function", "function": FUNCTION}
ASK = {"role": "user", "content": "What is 12 + 30?"}
OPENED = {"role": "assistant", "content": "<think>\n"}  # a prompt that has begun to think
OFF = ({"enable_thinking": False}, {"reasoning_effort": "none"}, {"thinking": False})

FORMS: st.SearchStrategy[dict[str, Any] | None] = st.one_of(
    st.sampled_from([None, {"type": "text"}, {"type": "json_object"}]),
    st.lists(st.sampled_from(TEXTS), min_size=1, max_size=4).map(lambda c: {"type": "choice", "choice": c}),
    st.sampled_from(PATTERNS).map(lambda p: {"type": "regex", "regex": p}),
    st.sampled_from(SCHEMAS).map(lambda s: {"type": "json_schema", "json_schema": {"schema": s}}),
    st.just({"type": "grammar", "grammar": 'start: "-"? D ("+" D){0,3}\nD: /[0-9]/'}),
)
SETTINGS = st.fixed_dictionaries(
    {"random_seed": st.integers(0, 99), "max_new_tokens": st.sampled_from([1, 9, 60])},
    optional={
        "n": st.just(2),
        "do_sample": st.just(True),
        "temperature": st.sampled_from([0.0, 0.7, 2.0]),
        "top_k": st.sampled_from([0, 1, 40]),
        "top_p": st.sampled_from([0.3, 0.95]),
        "min_p": st.just(0.1),
        "repetition_penalty": st.sampled_from([0.7, 1.3]),
        "presence_penalty": st.just(1.5),
        "stop_words": st.sampled_from([["a"], ["</think>"], ["}", "zz"]]),
        "include_stop_str_in_output": st.booleans(),
        "ignore_eos": st.just(True),
        "min_new_tokens": st.sampled_from([4, 30]),
        "skip_special_tokens": st.booleans(),
        "bad_words": st.just(["zebra"]),
        "logit_bias": st.just({77: -5.0, 99: 5.0}),
        "logprobs": st.just(2),
    },
)


@dataclass
class Case:
    """One call, and how its answers are read."""

    settings: dict[str, Any]
    form: dict[str, Any] | None
    tools: str | None
    reasoning: str | None
    thinking: dict[str, Any]
    opened: bool
    choice: str
    answers: dict[tuple[bool, int], list[Delta]] = field(default_factory=dict)  # by streamed, and which of n

    def prepare(self, pipe: Pipeline) -> Prepared:
        messages = [ASK, OPENED] if self.opened else [ASK]
        chat = Chat(
            pipe.frontend,
            tool_format(self.tools) if self.tools else None,
            reasoning_format(self.reasoning) if self.reasoning else None,
            MediaAccess(),
        )
        return chat.prepare(
            ChatCall(
                Prompt(messages=tuple(normalise_messages(messages))),
                GenerationConfig(response_format=self.form, **self.settings),
                tools=[TOOL] if self.tools else [],
                tool_choice=ToolChoice(self.choice if self.tools else "auto"),
                template_kwargs=self.thinking,
            )
        )

    @property
    def must_call(self) -> bool:
        return bool(self.tools) and self.choice == "required"


CASES = st.builds(
    Case,
    SETTINGS,
    FORMS,
    st.sampled_from([None, "qwen", "llama3", "mistral", "glm4", "qwen3coder"]),
    st.sampled_from([None, "default", "default"]),
    st.sampled_from([{}, {"enable_thinking": True}, *OFF]),
    st.sampled_from([False, False, True]),
    st.sampled_from(["auto", "auto", "none", "required"]),
)


@cases(2000)
def test_what_is_accepted_has_its_form(pipe: Pipeline, cases: int) -> None:
    seen = {"accepted": 0, "whole": 0, "thought": 0}

    @drawn(cases // AT_ONCE)
    @given(st.lists(CASES, min_size=AT_ONCE, max_size=AT_ONCE))
    def check(drawn_cases: list[Case]) -> None:
        accepted = run(pipe, drawn_cases)
        seen["accepted"] += len(accepted)
        for case in accepted:
            for choice in range(case.settings.get("n", 1)):
                streamed, whole = (case.answers[stream, choice] for stream in (True, False))
                assert told(streamed) == told(whole), case
                answer, finish = told(whole)
                seen["thought"] += bool(answer.reasoning)
                seen["whole"] += has_form(case, answer, finish)

    check()
    assert seen["accepted"] > 0.6 * cases, seen
    assert seen["whole"] > 0.2 * cases, seen
    assert seen["thought"] > 0.02 * cases, seen


def run(pipe: Pipeline, drawn_cases: list[Case]) -> list[Case]:
    """Those that are accepted, with their answers."""
    pieces: queue.SimpleQueue[tuple[Case, bool, Response]] = queue.SimpleQueue()
    readers: dict[tuple[int, bool, int], Any] = {}
    left, accepted = 0, []
    for case in drawn_cases:
        try:
            ready = case.prepare(pipe)
            for stream in (True, False):
                for choice in range(ready.job.config.n):
                    readers[id(case), stream, choice] = ready.reader(choice)

                def post(piece: Response, case: Case = case, stream: bool = stream) -> None:
                    pieces.put((case, stream, piece))

                pipe.frontend.submit(ready.job.prompt, ready.job.config, post, stream=stream)
                left += ready.job.config.n
        except (RequestError, ConfigError):
            continue
        accepted.append(case)
    while left:
        case, stream, piece = pieces.get(timeout=PATIENCE)
        assert piece.finish_reason != "error", (case, piece.error_message)
        delta = readers[id(case), stream, piece.choice].read(piece)
        case.answers.setdefault((stream, piece.choice), []).append(delta)
        left -= piece.finish_reason is not None
    return accepted


def told(deltas: list[Delta]) -> tuple[ParsedAnswer, Finish | None]:
    return collect(event for delta in deltas for event in delta.events), deltas[-1].finish


def has_form(case: Case, answer: ParsedAnswer, finish: Finish | None) -> bool:
    """Checks an answer, and says whether it was a whole one with a form."""
    assert finish is not None
    held = case.must_call or (case.form is not None and case.form["type"] != "text")
    if held and case.reasoning and case.thinking in OFF:
        assert not answer.reasoning, case
    if not held or finish.reason not in ("stop", "tool_calls") or finish.stop_match is not None:
        return False
    if case.must_call:
        assert not answer.content, (case, answer)
        assert answer.tool_calls, (case, answer)
        for call in answer.tool_calls:
            jsonschema.validate(json.loads(call.arguments), FUNCTION["parameters"])
    else:
        assert fits(case.form or {}, answer.content), (case, answer)
        assert not answer.tool_calls, (case, answer)
    return True


def fits(form: dict[str, Any], text: str) -> bool:
    match form["type"]:
        case "choice":
            return text in form["choice"]
        case "regex":
            return re.fullmatch(form["regex"], text) is not None
        case "grammar":
            return re.fullmatch(r"-?\d(\+\d){0,3}", text) is not None
        case "json_object":
            return isinstance(json.loads(text), dict)
    jsonschema.validate(json.loads(text), form["json_schema"]["schema"])
    return True
