"""Forms, reasoning on and off, and what a request leaves open, over HTTP on the embedded model."""

from __future__ import annotations

import copy
import json
import re

import httpx
import pytest
from pydantic import BaseModel

from lmdeploy_jax.server.anthropic.bodies import CountTokensRequest, MessagesRequest
from lmdeploy_jax.server.completions.bodies import CompletionRequest
from lmdeploy_jax.server.embeddings.bodies import EmbeddingsRequest, PoolingRequest
from lmdeploy_jax.server.native.bodies import GenerateRequest, PerplexityRequest
from lmdeploy_jax.server.openai_chat.bodies import ChatCompletionRequest
from lmdeploy_jax.server.responses.bodies import ResponsesRequest
from lmdeploy_jax.server.routes.admin import AbortRequest
from lmdeploy_jax.server.tokens.bodies import DetokenizeRequest, EncodeRequest, TokenizeRequest
from tests.server.mutations import GOOD
from tests.server.test_chat import CALCULATOR

CHOICES = ["alpha", " beta", "\n\ngamma"]
FORMS = [
    ({"type": "choice", "choice": ["alpha", "beta"]}, "alpha|beta"),
    ({"type": "choice", "choice": CHOICES}, "alpha| beta|\n\ngamma"),
    ({"type": "regex", "regex": "[\n ]{0,3}[0-9]{3}"}, "[\n ]{0,3}[0-9]{3}"),
    ({"type": "json_schema", "json_schema": {"schema": {"type": "integer"}}}, "-?[0-9]+"),
]
MAY_THINK = [{}, {"enable_thinking": True}]
THINKING = [
    *MAY_THINK,
    {"enable_thinking": False},
    {"reasoning_effort": "none"},
    {"chat_template_kwargs": {"thinking": False}},
]
ASK = [{"role": "user", "content": "Ann is 30"}]


@pytest.fixture(scope="module")
def http(live):
    with httpx.Client(base_url=live.url, timeout=60) as http:
        yield http


def streamed(http, body):
    """The text and the reasoning of a stream of chunks."""
    lines = http.post("/v1/chat/completions", json=body | {"stream": True}).text.splitlines()
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
    return tuple("".join(d.get(name) or "" for d in deltas) for name in ("content", "reasoning_content"))


@pytest.mark.parametrize("thinking", THINKING)
@pytest.mark.parametrize(("form", "pattern"), FORMS)
def test_the_content_is_the_form_and_nothing_else(http, form, pattern, thinking):
    body = {"messages": ASK, "temperature": 0, "response_format": form, "max_tokens": 200} | thinking
    message = http.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]
    assert re.fullmatch(pattern, message["content"]), message
    reasoning = message["reasoning_content"] or ""
    assert reasoning == reasoning.strip("\n")
    assert not reasoning or thinking in MAY_THINK
    assert streamed(http, body) == (message["content"], reasoning)


def test_the_model_does_think_before_a_form_where_it_may(http):
    """Else the test above would prove little."""
    body = {"messages": ASK, "temperature": 0, "enable_thinking": True, "max_tokens": 200}
    for form, _ in FORMS:
        answer = http.post("/v1/chat/completions", json=body | {"response_format": form}).json()
        assert answer["choices"][0]["message"]["reasoning_content"]


@pytest.mark.parametrize("stream", [False, True])
def test_without_a_form_nothing_begins_with_the_gap(http, stream):
    body = {"messages": ASK, "temperature": 0, "enable_thinking": True, "max_tokens": 100}
    if stream:
        content, reasoning = streamed(http, body)
    else:
        message = http.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]
        content, reasoning = message["content"], message["reasoning_content"]
    for text in (content, reasoning):
        assert text
        assert not text.startswith("\n")
    assert not reasoning.endswith("\n")


def test_an_offered_tool_does_not_change_how_a_form_is_read(http):
    """Content that is held to a form may look like a call; it is none."""
    text = '<tool_call>\n{"name": "calculator", "arguments": {}}\n</tool_call>'
    form = {"type": "regex", "regex": re.escape(text)}
    body = {"messages": ASK, "response_format": form, "tools": [CALCULATOR], "enable_thinking": False}
    choice = http.post("/v1/chat/completions", json=body).json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == (text, "stop")


def test_no_thoughts_come_before_a_call_where_they_are_off(http):
    tool = {"name": "add", "input_schema": {"type": "object", "properties": {}}}
    body = {"max_tokens": 200, "messages": ASK, "tools": [tool], "tool_choice": {"type": "any"}}
    answer = http.post("/v1/messages", json=body | {"thinking": {"type": "disabled"}}).json()
    assert {block["type"] for block in answer["content"]} == {"tool_use"}


def test_no_effort_is_no_reasoning_in_responses(http):
    schema = {"type": "json_schema", "name": "n", "schema": {"enum": ["alpha", "beta"]}}
    body = {"input": "Ann is 30", "temperature": 0, "text": {"format": schema}}
    (item,) = http.post("/v1/responses", json=body | {"reasoning": {"effort": "none"}}).json()["output"]
    assert item["type"] == "message"
    assert json.loads(item["content"][0]["text"]) in ("alpha", "beta")


@pytest.mark.parametrize("name", ["template", "self", "messages", "tools", "add_generation_prompt"])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/tokenize"])
def test_template_variables_that_cannot_be_are_refused_by_name(http, path, name):
    answer = http.post(path, json={"messages": ASK, "chat_template_kwargs": {name: 1}})
    assert answer.status_code == 400
    assert name in answer.json()["error"]["message"]


MODELS: dict[str, type[BaseModel]] = {
    "/v1/chat/completions": ChatCompletionRequest,
    "/v1/completions": CompletionRequest,
    "/v1/responses": ResponsesRequest,
    "/v1/messages": MessagesRequest,
    "/v1/messages/count_tokens": CountTokensRequest,
    "/v1/embeddings": EmbeddingsRequest,
    "/pooling": PoolingRequest,
    "/generate": GenerateRequest,
    "/get_ppl": PerplexityRequest,
    "/v1/encode": EncodeRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
    "/abort_request": AbortRequest,
}


@pytest.mark.parametrize(("path", "body"), GOOD)
def test_a_null_is_as_good_as_nothing(path, body):
    """For every field of every body, and for those of the objects within."""
    model = MODELS[path]
    plain = model.model_validate(body)
    assert model.model_validate(with_nulls(body, plain)) == plain


def with_nulls(given: dict, parsed: BaseModel) -> dict:
    """The body with a null for every field that it leaves open, in the objects within too."""
    full = dict.fromkeys(type(parsed).model_fields) | copy.deepcopy(given)
    for name in type(parsed).model_fields:
        inner = getattr(parsed, name)
        if isinstance(inner, BaseModel):
            full[name] = with_nulls(given[name], inner) if name in given else full[name]
        elif isinstance(inner, list) and inner and isinstance(inner[0], BaseModel):
            full[name] = [with_nulls(g, p) for g, p in zip(given[name], inner, strict=True)]
    return full


NULLS = {
    "/v1/chat/completions": ("n", "stream", "logprobs", "parallel_tool_calls", "ignore_eos", "tool_choice"),
    "/v1/completions": ("n", "stream", "echo", "skip_special_tokens"),
    "/v1/responses": ("stream", "store", "parallel_tool_calls", "tool_choice", "reasoning"),
    "/v1/messages": ("stream", "thinking", "tool_choice"),
    "/v1/embeddings": ("encoding_format", "dimensions"),
    "/generate": ("stream", "max_tokens", "return_logprob"),
}


@pytest.mark.parametrize("path", NULLS)
def test_nulls_over_http(http, path):
    good = {"max_tokens": 2, "messages": ASK, "input": "hi", "prompt": "hi"}
    names = MODELS[path].model_fields
    body = {name: value for name, value in good.items() if name in names}
    answer = http.post(path, json=dict.fromkeys(NULLS[path]) | body)
    assert answer.status_code == 200, answer.text


HISTORY = [
    {"role": "user", "content": "x", "name": None},
    {"role": "assistant", "content": None, "refusal": None, "tool_calls": [
        {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{bad"}}]},
    {"role": "tool", "tool_call_id": "c", "content": "invalid arguments"},
]  # fmt: skip
ITEMS = [
    {"role": "user", "content": "x"},
    {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{bad", "status": None},
    {"type": "function_call_output", "call_id": "c", "output": "invalid arguments"},
]
BLOCKS = [
    {"role": "user", "content": "x"},
    {"role": "assistant", "content": [
        {"type": "tool_use", "id": "c", "name": "f", "input": {"raw_arguments": "{bad"}}]},
    {"role": "user", "content": [
        {"type": "tool_result", "tool_use_id": "c", "content": "invalid arguments"}]},
]  # fmt: skip


def test_a_conversation_with_a_malformed_call_goes_on_and_reads_the_same_in_every_protocol(http):
    def usage(path, **body):
        answer = http.post(path, json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()["usage"]

    chat = usage("/v1/chat/completions", messages=HISTORY, max_tokens=1)["prompt_tokens"]
    assert usage("/v1/responses", input=ITEMS, max_output_tokens=1)["input_tokens"] == chat
    anthropic = usage("/v1/messages", messages=BLOCKS, max_tokens=1)
    assert anthropic["input_tokens"] + anthropic["cache_read_input_tokens"] == chat
