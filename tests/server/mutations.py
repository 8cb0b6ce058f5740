"""Broken requests made of good ones: a seed decides which, so that what fails can be run again."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from typing import Any

ASK = [{"role": "user", "content": "What is 12 + 30?"}]
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
FUNCTION = {"name": "add", "description": "adds", "parameters": SCHEMA}
TOOL = {"type": "function", "function": FUNCTION}
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
PARTS = [{"type": "text", "text": "hi"}, {"type": "text", "text": "there"}]
BIAS = {"5": 1.5, "7": -100}

# One or several good requests a route, with few tokens each.
GOOD: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", {"messages": ASK, "max_tokens": 2, "temperature": 0.5, "seed": 1, "stream": True,
                              "stream_options": {"include_usage": True}, "logit_bias": BIAS}),
    ("/v1/chat/completions", {"model": "tiny-chat", "messages": [{"role": "user", "content": PARTS}], "n": 2,
                              "max_completion_tokens": 2, "logprobs": True, "top_logprobs": 2, "stop": ["a"],
                              "presence_penalty": 0.5, "frequency_penalty": 0.5, "user": "me"}),
    ("/v1/chat/completions", {"messages": [*ASK, {"role": "assistant", "content": None, "tool_calls": [CALL]},
                                           {"role": "tool", "tool_call_id": "c1", "content": "42"}],
                              "tools": [TOOL], "max_tokens": 2,
                              "tool_choice": {"type": "function", "function": {"name": "add"}}}),
    ("/v1/chat/completions", {"messages": ASK, "max_tokens": 2, "chat_template_kwargs": {"a": 1},
                              "response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}},
                              "bad_words": ["b"], "min_new_tokens": 1, "stop_token_ids": [3]}),
    ("/v1/chat/completions", {"input_ids": [1, 2, 3], "max_tokens": 1, "return_token_ids": True,
                              "return_logprob": True, "session_id": 4, "min_p": 0.1, "top_p": 0.5}),
    ("/v1/completions", {"prompt": ["one", "two"], "max_tokens": 2, "n": 2, "echo": True, "logprobs": 1,
                         "repetition_penalty": 1.1, "stop": "x"}),
    ("/v1/completions", {"prompt": [[1, 2], [3]], "max_tokens": 1, "stream": True, "best_of": 1,
                         "repetition_ngram_size": 2, "repetition_ngram_threshold": 2}),
    ("/v1/responses", {"input": "hi", "max_output_tokens": 2, "instructions": "be brief", "stream": True,
                       "metadata": {"a": "b"}, "store": True, "reasoning": {"effort": "low"}}),
    ("/v1/responses", {"input": [{"role": "user", "content": [{"type": "input_text", "text": "hi"}]},
                                 {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "hm"}]},
                                 {"type": "function_call", "call_id": "c", "name": "add", "arguments": "{}"},
                                 {"type": "function_call_output", "call_id": "c", "output": "3"}],
                       "max_output_tokens": 2, "tools": [{"type": "function", **FUNCTION}],
                       "text": {"format": {"type": "json_schema", "name": "n", "schema": SCHEMA}}}),
    ("/v1/messages", {"model": "tiny-chat", "max_tokens": 2, "messages": ASK, "system": "be brief",
                      "stop_sequences": ["a"], "stream": True, "top_k": 3, "thinking": {"type": "disabled"}}),
    ("/v1/messages", {"max_tokens": 2, "system": [{"type": "text", "text": "hi"}],
                      "messages": [*ASK, {"role": "assistant", "content": [
                          {"type": "thinking", "thinking": "hm", "signature": "s"},
                          {"type": "text", "text": "I add"},
                          {"type": "tool_use", "id": "t", "name": "add", "input": {"a": 1}}]},
                          {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t",
                                                        "content": [{"type": "text", "text": "42"}]}]}],
                      "tools": [{"name": "add", "input_schema": SCHEMA}],
                      "tool_choice": {"type": "tool", "name": "add"}}),
    ("/v1/messages/count_tokens", {"messages": ASK, "system": "be brief",
                                   "tools": [{"name": "add", "input_schema": SCHEMA}]}),
    ("/v1/embeddings", {"input": ["hi", "there"], "dimensions": 4, "encoding_format": "base64"}),
    ("/pooling", {"input": [1, 2, 3], "pooling": "mean"}),
    ("/generate", {"prompt": "hi", "max_tokens": 2, "return_logprob": True, "stream": True}),
    ("/generate", {"input_ids": [1, 2], "max_tokens": 1, "spaces_between_special_tokens": False,
                   "skip_special_tokens": False, "include_stop_str_in_output": True, "stop": ["a"]}),
    ("/get_ppl", {"input": "hello there"}),
    ("/v1/encode", {"input": ["hi", "there"], "do_preprocess": True, "add_bos": False}),
    ("/tokenize", {"messages": ASK, "return_token_strs": True, "tools": [TOOL]}),
    ("/tokenize", {"prompt": "hi", "add_special_tokens": False}),
    ("/detokenize", {"tokens": [1, 2, 3], "skip_special_tokens": True}),
    ("/abort_request", {"session_id": 99, "request_id": "none"}),
]  # fmt: skip


def nested(levels: int) -> Any:
    value: Any = "x"
    for i in range(levels):
        value = [value] if i % 2 else {"a": value}
    return value


DEEP = [nested(100), nested(220)]

ODD: list[Any] = [
    None, True, False, 0, -1, 1, 2, 2**31, 2**63, -(2**63) - 1, 10**40, 1e308, -1e308, 0.5, float("nan"),
    float("inf"), float("-inf"), "", " ", "a" * 3000, "\0", "\0\0a", "\ud800", "a\udfffb", "\U0010ffff",
    "\u202e\u200b", "0", "null", "../../etc/passwd", "{{ 1 / 0 }}", "<|im_end|>", "<think>", "<tool_call>",
    [], {}, [[]], [{}], [None], [0] * 600, [2**40], [-1], ["a"] * 300, {"": ""}, {"type": None},
    {"type": "text"}, {"type": []}, {"type": {}}, {"a\0": 1}, {"\ud800": 1}, {"role": []}, {"role": "user"},
    {"$ref": "#"}, {"$ref": "http://127.0.0.1:1/x"}, {"type": "object", "properties": 5},
    {"pattern": "(a+)+$"}, "[" * 5000 + "]" * 5000, '{"a":' * 300 + "1" + "}" * 300,
    {"messages": []}, {"enum": []}, *DEEP,
]  # fmt: skip
RAW = [
    b"[" * 900 + b"]" * 900,
    b"1" + b"0" * 5000,
    b"-0",
    b"1e999",
    b"NaN",
    b"-Infinity",
    b"0.1e-999",
    b"9" * 19,
]
HEADERS = [
    "text/plain",
    "application/xml",
    "multipart/form-data",
    "",
    "application/json;charset=utf-16",
    "\xff",
]

Request = tuple[str, dict[str, str], bytes]  # path, headers, body
Mutation = Callable[[random.Random, Any], None]


def paths(value: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where in the value its parts are."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = [prefix] if prefix else []
    for key, part in items:
        found += paths(part, (*prefix, key))
    return found


def _parent(body: Any, path: tuple[Any, ...]) -> Any:
    for key in path[:-1]:
        body = body[key]
    return body


def odd(rnd: random.Random) -> Any:
    return copy.deepcopy(rnd.choice(ODD))


def mutate(rnd: random.Random, body: dict[str, Any]) -> None:
    """Change one part of the body."""
    places = paths(body)
    if not places:
        return
    path = rnd.choice(places)
    parent, key = _parent(body, path), path[-1]
    match rnd.randrange(8):
        case 0:
            del parent[key]
        case 1:
            parent[key] = [parent[key]] * rnd.choice([1, 2, 50])
        case 2:
            parent[key] = {"a": parent[key]}
        case 3 if isinstance(parent, dict):
            parent[str(rnd.choice(ODD))[:20]] = odd(rnd)
        case 4:
            body[rnd.choice(list(rnd.choice(GOOD)[1]))] = odd(rnd)
        case _:
            parent[key] = odd(rnd)


def encode(rnd: random.Random, body: Any) -> bytes:
    """As JSON, sometimes as what only looks like it."""
    text = json.dumps(body, ensure_ascii=rnd.random() < 0.9)
    raw = text.encode("utf-8", "surrogatepass")
    match rnd.randrange(24):
        case 0:
            return raw[: rnd.randrange(len(raw))]
        case 1:
            at = rnd.randrange(len(raw))
            return raw[:at] + bytes([rnd.randrange(256)]) + raw[at + 1 :]
        case 2:
            return raw.replace(b"2", rnd.choice(RAW), 1)
        case 3:
            return b'{"a":' * rnd.choice([100, 3000]) + raw + b"}" * rnd.choice([0, 100, 3000])
        case 4:  # every key twice
            return raw[:-1] + b"," + raw[1:] if len(raw) > 2 else raw
        case 5:
            return rnd.choice(
                [b"", b"null", b"[]", b'""', b"0", b"\xff\xfe", b"\0", b"\xef\xbb\xbf" + raw, raw * 2]
            )
        case 6:
            return text.encode("utf-16")
    return raw


def broken(rnd: random.Random) -> Request:
    """A request that may still be a good one, now and then."""
    path, good = rnd.choice(GOOD)
    body = copy.deepcopy(good)
    for _ in range(rnd.choice([1, 1, 1, 2, 3])):
        mutate(rnd, body)
    kind = rnd.choice(HEADERS) if rnd.random() < 0.03 else "application/json"
    return path, {"content-type": kind}, encode(rnd, body)
