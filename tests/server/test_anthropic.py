"""Messages through Anthropic's client, on the embedded model."""

from __future__ import annotations

import asyncio

import anthropic
import pytest

MODEL = "tiny-chat"
ASK = [{"role": "user", "content": "What is 12 + 30?"}]
GREEDY = {"extra_body": {"temperature": 0}}  # the client itself no longer offers it
CALCULATOR = {
    "name": "calculator",
    "description": "Evaluate an arithmetic expression.",
    "input_schema": {
        "type": "object",
        "properties": {"expression": {"type": "string"}},
        "required": ["expression"],
        "additionalProperties": False,
    },
}


@pytest.fixture(scope="module")
def claude(live):
    return anthropic.Anthropic(base_url=live.url, api_key="none", max_retries=0)


def ask(claude, messages=ASK, **fields):
    return claude.messages.create(**{"model": MODEL, "max_tokens": 64, "messages": messages} | fields)


def test_an_answer_is_what_the_pipeline_says(claude, pipe):
    answer = ask(claude, **GREEDY)
    expected = pipe("What is 12 + 30?")
    assert [block.type for block in answer.content] == ["text"]
    assert answer.content[0].text == expected.text
    assert (answer.stop_reason, answer.stop_sequence) == ("end_turn", None)
    usage = answer.usage
    assert usage.input_tokens + usage.cache_read_input_tokens == expected.input_token_len
    assert usage.output_tokens == expected.generate_token_len


def test_a_stream_adds_up_to_the_answer(claude):
    whole = ask(claude, **GREEDY)
    with claude.messages.stream(model=MODEL, max_tokens=64, messages=ASK, **GREEDY) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == final.content[0].text == whole.content[0].text
    assert final.stop_reason == "end_turn"
    assert final.usage.output_tokens == whole.usage.output_tokens


def test_asynchronous(live):
    async def main():
        fields = {"model": MODEL, "max_tokens": 8, "messages": ASK} | GREEDY
        async with anthropic.AsyncAnthropic(base_url=live.url, api_key="none", max_retries=0) as claude:
            return await asyncio.gather(*[claude.messages.create(**fields) for _ in range(3)])

    texts = {answer.content[0].text for answer in asyncio.run(main())}
    assert len(texts) == 1


def test_length_and_stop_sequence_are_told(claude):
    assert ask(claude, max_tokens=1, **GREEDY).stop_reason == "max_tokens"
    whole = ask(claude, **GREEDY).content[0].text
    stop = whole[1]
    answer = ask(claude, **GREEDY, stop_sequences=[stop])
    assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", stop)
    assert "".join(block.text for block in answer.content) == whole[: whole.index(stop)]


@pytest.mark.parametrize("stream", [False, True])
def test_the_round_of_a_tool(claude, stream):
    fields = {"tools": [CALCULATOR], **GREEDY}
    messages = [{"role": "user", "content": "Use the calculator: what is 17 * 23?"}]
    for choice in ({"type": "any"}, {"type": "tool", "name": "calculator"}):
        if stream:
            with claude.messages.stream(
                model=MODEL, max_tokens=64, messages=messages, tool_choice=choice, **fields
            ) as events:
                answer = events.get_final_message()
        else:
            answer = ask(claude, messages, tool_choice=choice, **fields)
        call = next(block for block in answer.content if block.type == "tool_use")
        assert (answer.stop_reason, call.name) == ("tool_use", "calculator")
        assert isinstance(call.input["expression"], str)
        assert call.id.startswith("toolu_")
    result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "391"}]}
    turns = [{"role": "assistant", "content": answer.content}, {"role": "user", "content": [result]}]
    final = ask(claude, messages + turns, **fields)
    assert "391" in final.content[0].text


def test_tokens_are_counted_with_system_and_tools(claude):
    def count(**fields):
        return claude.messages.count_tokens(model=MODEL, messages=ASK, **fields).input_tokens

    answer = ask(claude, system="Be brief.")
    counted = count(system="Be brief.")
    assert counted == answer.usage.input_tokens + answer.usage.cache_read_input_tokens
    assert count(tools=[CALCULATOR]) > count()


def test_system_blocks_and_prefill(claude):
    blocks = [
        {"type": "text", "text": "x-anthropic-billing-header: 1"},
        {"type": "text", "text": "Be brief."},
    ]
    same = [
        claude.messages.count_tokens(model=MODEL, messages=ASK, system=system).input_tokens
        for system in (blocks, "Be brief.")
    ]
    assert same[0] == same[1]
    prefill = [*ASK, {"role": "assistant", "content": "12 + 30 ="}]
    assert not ask(claude, prefill, **GREEDY).content[0].text.startswith("12 + 30 =")


def test_errors_have_the_shape_of_the_protocol(claude):
    with pytest.raises(anthropic.NotFoundError) as missing:
        ask(claude, model="other")
    assert missing.value.body["error"]["type"] == "not_found_error"
    image = {"type": "image", "source": {"type": "url", "url": "http://127.0.0.1/x.png"}}
    with pytest.raises(anthropic.BadRequestError, match="image"):
        ask(claude, [{"role": "user", "content": [image]}])
    with pytest.raises(anthropic.BadRequestError, match="max_tokens"):
        ask(claude, max_tokens=0)
    with pytest.raises(anthropic.BadRequestError, match=r"prompt is too long: \d+ tokens > 512 maximum"):
        ask(claude, [{"role": "user", "content": "word " * 2000}])
