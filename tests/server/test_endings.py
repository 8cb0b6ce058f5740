"""How answers end that go wrong, in every protocol, streamed and whole, as the official clients read it."""

from __future__ import annotations

import json
from collections.abc import Iterator

import anthropic
import httpx
import openai
import pytest

from lmdeploy_jax.engine.request import Request
from lmdeploy_jax.errors import LogitsError
from tests.scripted import TOKENIZER, ids
from tests.server.live import serving
from tests.server.scripted import scripted

GOOD = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
BROKEN = '<tool_call>\n{"name": "f", "arguments": {"a"}}\n</tool_call>'
NO_CALL = "<tool_call>\nf(a=1)\n</tool_call>"
CUT = '<tool_call>\n{"name": "f", "arguments": {"a": "x'
ANSWERS = {
    "good": GOOD,
    "broken": f"Well.\n{BROKEN}",
    "no call": NO_CALL,
    "cut": CUT,
    "good, then broken": f"{GOOD}\n{BROKEN}",
}
NAN = "degenerate"
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": SCHEMA}}]


def script(request: Request, index: int) -> Iterator[int]:
    """Says what the prompt's last line asks for."""
    prompt = TOKENIZER.decode(request.prompt.ids, skip_special_tokens=False)
    asked = prompt.split("<|im_start|>user\n")[-1].split("<|im_end|>")[0]
    if asked in ANSWERS:
        yield from ids(ANSWERS[asked])
    elif index == 1:
        yield from ids("Fine.")
    else:
        yield from ids("Half an" if NAN in asked else "", stop=False)
        raise LogitsError("A logit is NaN.")


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with scripted(script) as (frontend, _), serving(frontend) as live:
        yield live.url


@pytest.fixture(scope="module")
def gpt(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def claude(url: str) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=url, api_key="none", max_retries=0)


def user(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def chat(gpt: openai.OpenAI, text: str, **fields: object):
    return gpt.chat.completions.create(model="", messages=user(text), tools=TOOLS, **fields)


CASES = [
    # asked, content, number of calls, how it ends
    ("good", None, 1, "tool_calls"),
    ("broken", ANSWERS["broken"], 0, "parse_error"),
    ("no call", NO_CALL, 0, "parse_error"),
    ("cut", CUT, 0, "parse_error"),
    ("good, then broken", f"\n{BROKEN}", 1, "parse_error"),
]


@pytest.mark.parametrize(("asked", "content", "calls", "reason"), CASES)
def test_chat(gpt, asked, content, calls, reason):
    (choice,) = chat(gpt, asked).choices
    assert (choice.message.content, choice.finish_reason) == (content, reason)
    assert [c.function.arguments for c in choice.message.tool_calls or ()] == ['{"a": 1}'] * calls
    reasons = [c.choices[0].finish_reason for c in chat(gpt, asked, stream=True)]
    assert reasons[-1] == reason
    assert not any(reasons[:-1])


def test_chat_through_the_client_that_adds_streams_up(gpt):
    with gpt.chat.completions.stream(model="", messages=user("no call"), tools=TOOLS) as stream:
        (choice,) = stream.get_final_completion().choices
    assert (choice.finish_reason, choice.message.content) == ("parse_error", NO_CALL)


@pytest.mark.parametrize(("asked", "content", "calls", "reason"), CASES)
def test_messages(claude, asked, content, calls, reason):
    tools = [{"name": "f", "input_schema": SCHEMA}]
    fields = {"model": "", "max_tokens": 100, "messages": user(asked), "tools": tools}
    wanted = {"tool_calls": "tool_use"}.get(reason, reason)
    whole = claude.messages.create(**fields)
    assert whole.stop_reason == wanted
    assert [block.text for block in whole.content if block.type == "text"] == ([content] if content else [])
    assert [block.input for block in whole.content if block.type == "tool_use"] == [{"a": 1}] * calls
    with claude.messages.create(**fields, stream=True) as events:
        told = list(events)
    assert told[-2].delta.stop_reason == wanted
    starts = [event.index for event in told if event.type == "content_block_start"]
    stops = [event.index for event in told if event.type == "content_block_stop"]
    assert starts == stops == list(range(len(starts)))


@pytest.mark.parametrize(("asked", "content", "calls", "reason"), CASES)
def test_responses(gpt, asked, content, calls, reason):
    tools = [{"type": "function", "name": "f", "parameters": SCHEMA}]
    fields = {"model": "", "input": asked, "tools": tools}
    failed = reason == "parse_error"
    whole = gpt.responses.create(**fields)
    last = list(gpt.responses.create(**fields, stream=True))[-1]
    assert last.type == ("response.incomplete" if failed else "response.completed")
    for response in (whole, last.response):
        assert response.status == ("incomplete" if failed else "completed")
        assert (response.incomplete_details and response.incomplete_details.reason) == (
            "parse_error" if failed else None
        )
    assert whole.output_text == (content or "")
    assert [i.status for i in whole.output if i.type == "function_call"] == ["completed"] * calls
    streamed = [i.status for i in last.response.output if i.type == "function_call"]
    assert streamed.count("completed") == calls
    if failed:  # what goes on from it holds no half call
        again = gpt.responses.create(**fields | {"input": "good"}, previous_response_id=last.response.id)
        assert again.status == "completed"


def test_a_call_that_a_limit_cuts_is_not_malformed(gpt):
    (choice,) = chat(gpt, "cut", max_tokens=len(ids(CUT)) - 1).choices
    assert (choice.finish_reason, choice.message.content) == ("length", None)
    assert choice.message.tool_calls[0].function.arguments == '{"a": "x'


ERROR = {"message": "A logit is NaN.", "type": "server_error", "param": None, "code": "invalid_logits"}


@pytest.mark.parametrize(("asked", "said"), [(NAN, "Half an"), ("at once", "")])
def test_chat_without_a_distribution(gpt, asked, said):
    (choice,) = chat(gpt, asked).choices
    assert (choice.finish_reason, choice.message.content, choice.error) == ("error", said, ERROR)
    chunks = list(chat(gpt, asked, stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == said
    assert (chunks[-1].choices[0].finish_reason, chunks[-1].choices[0].error) == ("error", ERROR)


@pytest.mark.parametrize("stream", [False, True])
def test_the_other_answers_go_on(gpt, stream):
    if stream:
        last = {c.choices[0].index: c.choices[0] for c in chat(gpt, NAN, n=2, stream=True)}
    else:
        last = dict(enumerate(chat(gpt, NAN, n=2).choices))
        assert last[1].message.content == "Fine."
    assert [last[i].finish_reason for i in (0, 1)] == ["error", "stop"]
    assert not hasattr(last[1], "error")


@pytest.mark.parametrize("asked", [NAN, "at once"])
def test_completions_without_a_distribution(gpt, asked):
    fields = {"model": "", "prompt": asked, "echo": True, "logprobs": 1}
    (choice,) = gpt.completions.create(**fields).choices
    assert (choice.finish_reason, choice.error) == ("error", ERROR)
    assert choice.text.startswith(asked)
    chunks = list(gpt.completions.create(**fields, stream=True))
    assert (chunks[-1].choices[0].finish_reason, chunks[-1].choices[0].error) == ("error", ERROR)


def test_generate_without_a_distribution(url):
    body = {"prompt": NAN}
    whole = httpx.post(url + "/generate", json=body).json()
    lines = httpx.post(url + "/generate", json=body | {"stream": True}).text.splitlines()
    events = [line.removeprefix("data: ") for line in lines if line]
    assert events[-1] == "[DONE]"
    for told in (whole, json.loads(events[-2])):
        assert told["meta_info"]["finish_reason"]["type"] == "error"
        assert told["error"] == ERROR
    assert whole["text"] == "Half an"


def test_messages_without_a_distribution(claude):
    fields = {"model": "", "max_tokens": 100, "messages": user(NAN)}
    whole = claude.messages.create(**fields)
    assert (whole.stop_reason, whole.content[0].text) == ("error", "Half an")
    assert whole.error == {"type": "api_error", "message": "A logit is NaN.", "code": "invalid_logits"}
    told = []
    with pytest.raises(anthropic.APIStatusError) as caught:
        told.extend(claude.messages.create(**fields, stream=True))
    assert "".join(e.delta.text for e in told if e.type == "content_block_delta") == "Half an"
    assert caught.value.body["error"] == whole.error


def test_responses_without_a_distribution(gpt):
    whole = gpt.responses.create(model="", input=NAN)
    last = list(gpt.responses.create(model="", input=NAN, stream=True))[-1]
    assert last.type == "response.failed"
    for response in (whole, last.response):
        assert (response.status, response.output_text) == ("failed", "Half an")
        assert (response.error.code, response.error.message) == ("invalid_logits", "A logit is NaN.")
        assert response.output[0].status == "incomplete"
        with pytest.raises(openai.NotFoundError):
            gpt.responses.create(model="", input="good", previous_response_id=response.id)


@pytest.mark.parametrize("path", ["/v1/embeddings", "/pooling", "/get_ppl"])
def test_what_is_no_answer_has_a_status(url, path):
    answer = httpx.post(url + path, json={"input": "x y z"})
    assert (answer.status_code, answer.json()["error"]) == (500, ERROR)
