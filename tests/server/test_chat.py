"""Chat completions through OpenAI's client, on the embedded model."""

from __future__ import annotations

import asyncio
import json

import openai
import pytest

MODEL = "tiny-chat"
ASK = [{"role": "user", "content": "What is 12 + 30?"}]
CALCULATOR = {
    "type": "function",
    "function": {
        "name": "calculator",
        "description": "Evaluate an arithmetic expression.",
        "parameters": {
            "type": "object",
            "properties": {"expression": {"type": "string"}},
            "required": ["expression"],
            "additionalProperties": False,
        },
    },
}


def chat(client, messages=ASK, **fields):
    return client.chat.completions.create(model=MODEL, messages=messages, **fields)


def said(chunks):
    """The text, the last finish reason and the usage of a stream."""
    chunks = list(chunks)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    reasons = [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason]
    return text, reasons, chunks[-1].usage


def test_models(client):
    (card,) = client.models.list().data
    assert card.id == MODEL
    assert client.models.retrieve(MODEL).id == MODEL


def test_an_answer_is_what_the_pipeline_says(client, pipe):
    answer = chat(client)
    expected = pipe("What is 12 + 30?")
    (choice,) = answer.choices
    assert choice.message.content == expected.text
    assert choice.finish_reason == "stop"
    assert answer.usage.prompt_tokens == expected.input_token_len
    assert answer.usage.completion_tokens == expected.generate_token_len
    assert answer.id.startswith("chatcmpl-")


def test_a_stream_adds_up_to_the_answer(client):
    whole = chat(client).choices[0].message.content
    text, reasons, usage = said(chat(client, stream=True, stream_options={"include_usage": True}))
    assert text == whole
    assert reasons == ["stop"]
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens > 0
    assert said(chat(client, stream=True))[2] is None


def test_many_at_once_through_the_async_client(aclient, pipe):
    prompts = [f"What is {i} + {j}?" for i in range(3, 9) for j in (2, 5)]

    async def ask(prompt):
        stream = await chat(aclient, [{"role": "user", "content": prompt}], stream=True)
        return "".join([c.choices[0].delta.content or "" async for c in stream])

    async def ask_all():
        return await asyncio.gather(*map(ask, prompts))

    assert asyncio.run(ask_all()) == [r.text for r in pipe(prompts)]


def test_tools_round_trip(client):
    messages = [{"role": "user", "content": "Use the calculator: 17 * 23"}]
    first = chat(client, messages, tools=[CALCULATOR], tool_choice="required").choices[0]
    assert first.finish_reason == "tool_calls"
    (call,) = first.message.tool_calls[:1]
    assert call.function.name == "calculator"
    assert set(json.loads(call.function.arguments)) == {"expression"}
    messages += [
        first.message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "391"},
    ]
    assert "391" in chat(client, messages, tools=[CALCULATOR]).choices[0].message.content


def test_streamed_calls_equal_complete_ones(client):
    fields = {"tools": [CALCULATOR], "tool_choice": {"type": "function", "function": {"name": "calculator"}}}
    whole = chat(client, **fields).choices[0].message.tool_calls
    names, arguments = {}, {}
    for chunk in chat(client, stream=True, **fields):
        for call in chunk.choices[0].delta.tool_calls or ():
            if call.id:
                names[call.index] = call.function.name
            arguments[call.index] = arguments.get(call.index, "") + call.function.arguments
    assert [(names[i], arguments[i]) for i in names] == [
        (c.function.name, c.function.arguments) for c in whole
    ]


def test_reasoning_is_told_apart(client):
    fields = {"extra_body": {"chat_template_kwargs": {"enable_thinking": True}}}
    message = chat(client, **fields).choices[0].message
    assert "think" not in (message.content or "")
    assert message.reasoning_content
    deltas = [c.choices[0].delta for c in chat(client, stream=True, **fields)]
    reasoning = "".join(getattr(d, "reasoning_content", None) or "" for d in deltas)
    assert (reasoning, "".join(d.content or "" for d in deltas)) == (
        message.reasoning_content,
        message.content,
    )


def test_an_unknown_model_is_not_found(client):
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="zz", messages=ASK)
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_is_too_long_names_both_lengths(client, stream):
    with pytest.raises(
        openai.BadRequestError, match=r"maximum context length is 512 tokens\. .* \d{4} tokens"
    ) as caught:
        chat(client, [{"role": "user", "content": "word " * 2000}], stream=stream)
    assert caught.value.code == "context_length_exceeded"
