"""Responses through OpenAI's client, on the embedded model."""

from __future__ import annotations

import json

import openai
import pytest

from lmdeploy_jax.server.errors import ApiError
from lmdeploy_jax.server.responses.store import ResponseStore

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
        store.put(id, [{"role": "user", "content": id}])
    assert store.get("c")[0]["content"] == "c"
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
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
    ],
)
def test_what_is_refused(client, fields, match):
    with pytest.raises(openai.BadRequestError, match=match):
        respond(client, **fields)
