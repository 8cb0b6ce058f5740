"""Responses through OpenAI's client, on the embedded model."""

from __future__ import annotations

import json

import openai
import pytest

from lmdeploy_jax.server.errors import ApiError
from lmdeploy_jax.server.responses.store import ResponseStore, StoredResponse

MODEL = "tiny-chat"
CALCULATOR = {
    "type": "function",
    "name": "calculator",
    "description": "Evaluate an arithmetic expression.",
    "parameters": {
        "type": "object",
        "properties": {"expression": {"type": "string"}},
        "required": ["expression"],
        "additionalProperties": False,
    },
    "strict": True,
}


def respond(client, input="What is 12 + 30?", **fields):
    return client.responses.create(**{"model": MODEL, "input": input, "temperature": 0} | fields)


def test_an_answer_is_what_the_pipeline_says(client, pipe):
    response = respond(client)
    expected = pipe("What is 12 + 30?")
    assert response.output_text == expected.text
    assert response.status == "completed"
    assert response.usage.input_tokens == expected.input_token_len
    assert response.usage.output_tokens == expected.generate_token_len


def test_a_stream_adds_up_to_the_answer(client):
    whole = respond(client)
    events = list(respond(client, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == events[-1].response.output_text == whole.output_text


def test_a_conversation_goes_on(client, pipe):
    first = respond(client, "My name is Anna.")
    second = respond(client, "What is my name?", previous_response_id=first.id)
    assert "Anna" in second.output_text
    streamed = list(respond(client, "My name is Anna.", stream=True))[-1].response
    assert "Anna" in respond(client, "What is my name?", previous_response_id=streamed.id).output_text


def test_what_is_not_stored_is_not_found(client):
    first = respond(client, store=False)
    with pytest.raises(openai.NotFoundError, match="previous_response_id"):
        respond(client, previous_response_id=first.id)


def test_the_store_is_bounded():
    store = ResponseStore(2)
    for id in "abc":
        store.put(id, StoredResponse([{"role": "user", "content": id}]))
    assert store.get("c").messages[0]["content"] == "c"
    with pytest.raises(ApiError, match="is forgotten"):
        store.get("a")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "calculator"}])
def test_the_round_of_a_tool(client, choice):
    fields = {"tools": [CALCULATOR]}
    asked = [{"role": "user", "content": "Use the calculator: what is 17 * 23?"}]
    response = respond(client, asked, tool_choice=choice, **fields)
    call = next(item for item in response.output if item.type == "function_call")
    assert "expression" in json.loads(call.arguments)
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "391"}
    replayed = respond(client, [*asked, call.model_dump(), result], **fields)
    continued = respond(client, [result], previous_response_id=response.id, **fields)
    assert "391" in replayed.output_text
    assert continued.output_text == replayed.output_text


def test_streamed_calls(client):
    stream = respond(client, "What is 17 * 23?", tools=[CALCULATOR], tool_choice="required", stream=True)
    events = list(stream)
    pieces = [e.delta for e in events if e.type == "response.function_call_arguments.delta"]
    done = next(e for e in events if e.type == "response.function_call_arguments.done")
    assert "".join(pieces) == done.arguments == events[-1].response.output[-1].arguments


def test_structured_text(client):
    schema = {"type": "object", "properties": {"n": {"type": "integer", "maximum": 99}}, "required": ["n"]}
    form = {"type": "json_schema", "name": "number", "schema": schema | {"additionalProperties": False}}
    answer = respond(client, text={"format": form}, max_output_tokens=64)
    assert isinstance(json.loads(answer.output_text)["n"], int)


def test_what_is_cut_is_incomplete(client):
    response = respond(client, max_output_tokens=1)
    assert response.status == "incomplete"
    assert response.incomplete_details.reason == "max_output_tokens"


def test_instructions_lead(client):
    asked = respond(client, instructions="Be brief.").usage.input_tokens
    as_message = respond(
        client,
        [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "What is 12 + 30?"}],
    )
    assert as_message.usage.input_tokens == asked


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"input": [{"type": "image_generation_call"}]}, "image_generation_call"),
        ({"background": True}, "background"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input_image"),
        ({"tools": [{"type": "web_search"}], "tool_choice": {"type": "web_search"}}, "web_search"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_text", "text": 5}]}]},
            r"content\[0\].text=5",
        ),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
    ],
)
def test_what_is_refused(client, fields, match):
    with pytest.raises(openai.BadRequestError, match=match):
        respond(client, **fields)


def test_a_response_that_is_kept_can_be_read_and_deleted(client):
    first = respond(
        client, [{"role": "user", "content": "My name is Anna."}, {"role": "user", "content": "Hi"}]
    )
    streamed = list(respond(client, "More", stream=True, previous_response_id=first.id))[-1].response
    assert client.responses.retrieve(first.id).model_dump() == first.model_dump()
    assert client.responses.retrieve(streamed.id).output == streamed.output
    items = client.responses.input_items.list(first.id, order="asc").data
    assert [item.content[0].text for item in items] == ["My name is Anna.", "Hi"]
    page = client.responses.input_items.list(first.id, limit=1)
    assert (page.data[0].id, page.has_more) == (items[1].id, True)
    rest = client.responses.input_items.list(first.id, limit=1, after=items[1].id)
    assert (rest.data[0].id, rest.has_more) == (items[0].id, False)
    with pytest.raises(openai.BadRequestError, match="ended already, as completed"):
        client.responses.cancel(first.id)
    client.responses.delete(first.id)
    for look in (client.responses.retrieve, client.responses.delete, client.responses.cancel):
        with pytest.raises(openai.NotFoundError, match="is kept"):
            look(first.id)
    assert client.responses.retrieve(streamed.id).id == streamed.id, "others stay"


def test_a_response_that_is_being_made_can_be_cancelled(live, client):
    stream = respond(client, "Tell me a story.", stream=True, extra_body={"ignore_eos": True})
    first = next(iter(stream))
    cancelled = client.responses.cancel(first.response.id)
    assert (cancelled.id, cancelled.status) == (first.response.id, "cancelled")
    last = list(stream)[-1].response
    assert last.status == "cancelled"


def test_input_tokens_are_those_of_the_prompt(client):
    fields = {"tools": [CALCULATOR], "instructions": "Be brief."}
    used = respond(client, **fields).usage.input_tokens
    counted = client.responses.input_tokens.count(model=MODEL, input="What is 12 + 30?", **fields)
    assert counted.input_tokens == used


def test_an_empty_answer_is_the_same_streamed(client):
    fields = {"input": "What is 1 + 2?", "extra_body": {"stop": ["3"]}}
    whole = respond(client, **fields)
    streamed = list(respond(client, stream=True, **fields))[-1].response
    shape = [(item.type, item.content[0].text) for item in whole.output]
    assert shape == [("message", "")] == [(item.type, item.content[0].text) for item in streamed.output]


def test_a_strict_tool_is_held_to_its_schema_though_the_model_chose_it(client):
    """By itself the model leaves `unit` out."""
    properties = {"city": {"type": "string"}, "unit": {"type": "string", "enum": ["c", "f"]}}
    parameters = {"type": "object", "properties": properties, "required": ["city", "unit"]}
    weather = {"type": "function", "name": "get_weather", "parameters": parameters, "strict": True}
    response = respond(client, "What is the weather in Paris?", tools=[weather])
    (call,) = response.output
    assert set(json.loads(call.arguments)) == {"city", "unit"}


LOGPROBS = "message.output_text.logprobs"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("effort", ["none", "high"])
def test_the_texts_tokens_have_log_probabilities(client, stream, effort):
    """Those of the text and no others: not the thoughts', the tags' and the end's."""
    fields = {"reasoning": {"effort": effort}, "include": [LOGPROBS], "top_logprobs": 2, "stream": stream}
    answer = respond(client, "What is 12 + 30?", **fields)
    events = list(answer) if stream else []
    response = events[-1].response if stream else answer
    assert [item.type for item in response.output] == ["reasoning", "message"][effort == "none" :]
    (part,) = response.output[-1].content
    assert part.text == "".join(entry.token for entry in part.logprobs) == "42"
    assert all(entry.logprob <= 0 and len(entry.top_logprobs) == 2 for entry in part.logprobs)
    if stream:
        told = [e for event in events if event.type == "response.output_text.delta" for e in event.logprobs]
        assert [entry.token for entry in told] == [entry.token for entry in part.logprobs]
        (done,) = (event for event in events if event.type == "response.output_text.done")
        assert len(done.logprobs) == len(told)


def test_who_asks_for_no_log_probabilities_gets_none(client):
    for fields in ({}, {"top_logprobs": 0}):
        assert respond(client, **fields).output[0].content[0].logprobs == []
    (entry, *_) = respond(client, include=[LOGPROBS]).output[0].content[0].logprobs
    assert entry.top_logprobs == []
