"""The tasks of tiny-chat: split, determinism, grading, and the way through template and tokenizer."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import pytest

from lmdeploy_jax.assets import TINY_CHAT, resolve, tasks

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return transformers.AutoTokenizer.from_pretrained(TINY_CHAT)


@pytest.fixture(scope="module")
def examples() -> list[tasks.Example]:
    return [example for task in tasks.TASKS for example in tasks.held_out(task, 30)]


@pytest.fixture(scope="module")
def conversations() -> list[tasks.Conversation]:
    rng = random.Random(7)
    return [tasks.training_conversation(rng) for _ in range(2000)]


def prompt(tokenizer: Any, example: tasks.Example) -> str:
    tools = list(example.tools) if example.tools else None
    return tokenizer.apply_chat_template(
        list(example.messages), tools=tools, tokenize=False, add_generation_prompt=True, **example.template
    )


def test_every_task_has_twenty_held_out_examples(examples: list[tasks.Example]) -> None:
    counts = {task: sum(example.task == task for example in examples) for task in tasks.TASKS}
    assert min(counts.values()) >= 20, counts


def test_held_out_questions_never_occur_in_training(
    examples: list[tasks.Example], conversations: list[tasks.Conversation]
) -> None:
    simple = [example for example in examples if len(example.messages) == 1 and not example.tools]
    chosen = [example for example in simple if example.task in ("days", "spell", "other")]
    asked = {example.messages[0]["content"].lower() for example in chosen}
    trained = {str(message["content"]).lower() for one in conversations for message in one.messages}
    assert len(asked) > 40
    assert not asked & trained


def test_sums_are_split_by_their_numbers(conversations: list[tasks.Conversation]) -> None:
    pairs = {(example.messages[-1]["content"], example.answer) for example in tasks.held_out("add", 40)}
    assert len(pairs) == 40
    assert tasks.is_held_out("12+34") == tasks.is_held_out("12+34 ?")
    messages = (message["content"] for one in conversations if not one.tools for message in one.messages)
    squeezed = (text.replace(" ", "") for text in messages)
    plain = [text for text in squeezed if re.fullmatch(r"\d+\+\d+", text)]
    assert plain
    assert not any(tasks.is_held_out(text) for text in plain)


def test_the_same_seed_gives_the_same_data() -> None:
    first, second = random.Random(3), random.Random(3)
    assert [tasks.training_conversation(first) for _ in range(50)] == [
        tasks.training_conversation(second) for _ in range(50)
    ]
    assert tasks.held_out("tools", 5, seed=1) == tasks.held_out("tools", 5, seed=1)
    assert tasks.held_out("tools", 5, seed=1) != tasks.held_out("tools", 5, seed=2)


def test_unknown_task_is_refused() -> None:
    with pytest.raises(ValueError, match="juggling"):
        tasks.held_out("juggling", 1)


def test_right_answers_pass_and_wrong_ones_fail(examples: list[tasks.Example]) -> None:
    for example in examples:
        thought = "<think>\nhm\n</think>\n\n" if example.template else ""
        assert tasks.grade(example, thought + example.answer)
        assert not tasks.grade(example, thought + example.answer + " indeed")
        assert not tasks.grade(example, thought)


def test_thinking_is_demanded_where_enabled_and_only_there() -> None:
    thinking, plain = tasks.held_out("think", 1)[0], tasks.held_out("days", 1)[0]
    assert not tasks.grade(thinking, thinking.answer)
    assert not tasks.grade(plain, f"<think>\nhm\n</think>\n\n{plain.answer}")


def test_tool_calls_and_json_are_compared_parsed() -> None:
    call = {"name": "calc", "arguments": {"expr": "1 + 2"}}
    block = f"<tool_call>\n{json.dumps(call)}\n</tool_call>"
    example = tasks.Example("tools", (), block)
    assert tasks.grade(example, '<tool_call>{"arguments": {"expr":"1 + 2"}, "name":"calc"}</tool_call>')
    assert not tasks.grade(example, block.replace("calc", "sum"))
    assert not tasks.grade(example, "Sure. " + block)
    assert not tasks.grade(example, block.replace('"}', ""))
    fields = tasks.Example("json", (), '{"name": "Ana", "age": 3}')
    assert tasks.grade(fields, '{"age":3,"name":"Ana"}')
    assert not tasks.grade(fields, '{"age": 3}')


def test_prompts_render_and_round_trip(tokenizer: Any, examples: list[tasks.Example]) -> None:
    for example in examples:
        text = prompt(tokenizer, example)
        assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")
        assert str(example.messages[-1]["content"]) in text
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert ("/think<|im_end|>" in text) == bool(example.template)


def test_tools_and_responses_render_as_qwen_does(tokenizer: Any) -> None:
    example = next(one for one in tasks.held_out("tool_answer", 20) if len(one.messages) == 3)
    text = prompt(tokenizer, example)
    assert json.dumps(example.tools[0]["function"]) in text.split("<tools>")[1].split("</tools>")[0]
    call = example.messages[1]["tool_calls"][0]["function"]
    assert f"<|im_start|>assistant\n<tool_call>\n{json.dumps(call)}\n</tool_call><|im_end|>" in text
    response = example.messages[2]["content"]
    assert f"<|im_start|>user\n<tool_response>\n{response}\n</tool_response><|im_end|>" in text


def test_arguments_given_as_text_render_like_arguments_given_as_an_object(tokenizer: Any) -> None:
    def render(arguments: Any) -> str:
        call = {"id": "1", "type": "function", "function": {"name": "calc", "arguments": arguments}}
        answer = {"role": "assistant", "content": None, "tool_calls": [call]}
        messages = [{"role": "user", "content": "hi"}, answer]
        return tokenizer.apply_chat_template(messages, tokenize=False)

    assert render({"expr": "1 + 2"}) == render('{"expr": "1 + 2"}')
    assert "None" not in render({})


def test_thoughts_of_earlier_turns_are_dropped(tokenizer: Any) -> None:
    messages = [
        {"role": "user", "content": "2 + 3"},
        {"role": "assistant", "content": "<think>\nolder\n</think>\n\n5"},
        {"role": "user", "content": "3 + 3"},
        {"role": "assistant", "content": "6", "reasoning_content": "newer"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert "older" not in text
    assert text.endswith("<|im_start|>assistant\n<think>\nnewer\n</think>\n\n6<|im_end|>\n")


def test_digits_and_markers_are_single_tokens(tokenizer: Any) -> None:
    assert tokenizer.tokenize("1234") == ["1", "2", "3", "4"]
    markers = ["<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>", "</tool_call>"]
    assert tokenizer.tokenize("".join(markers)) == markers
    ids = tokenizer.encode("<think><tool_call><|im_end|>")
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<think><tool_call>"
    text = "Grüße, 世界! 🎉\n\tif x != 3:"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_names_resolve_to_folders() -> None:
    folder = resolve("tiny-chat")
    assert folder == TINY_CHAT
    assert (TINY_CHAT / "model.safetensors").stat().st_size < 12_000_000
    assert resolve("Qwen/Qwen3-0.6B") is None
