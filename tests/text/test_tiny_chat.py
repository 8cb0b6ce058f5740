"""The shipped model's tokenizer and chat template, against transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

import lmdeploy_jax
from lmdeploy_jax.text import Tokenizer
from lmdeploy_jax.text.chat_template import ChatTemplate, normalise_messages, select
from lmdeploy_jax.text.detokenize import IncrementalDetokenizer
from tests.text.samples import ANSWER, CALL, RESULT, SYSTEM, TOOLS, USER

FOLDER = Path(lmdeploy_jax.__file__).parent / "assets" / "tiny-chat"
THOUGHT = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nFour.", "reasoning_content": "hm"}


@pytest.fixture(scope="module")
def theirs() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def ours() -> Tokenizer:
    return Tokenizer(FOLDER)


@pytest.fixture(scope="module")
def template(ours: Tokenizer) -> ChatTemplate:
    return select(ours, FOLDER)


@pytest.mark.parametrize(
    ("messages", "tools"),
    [
        ([USER], None),
        ([SYSTEM, USER, ANSWER, USER], None),
        ([USER, THOUGHT, USER], None),
        ([SYSTEM, USER, CALL, RESULT, RESULT], TOOLS),
        ([USER, CALL, RESULT, THOUGHT, USER], TOOLS),
        ([USER, ANSWER], None),
    ],
)
def test_prompt_ids_equal_transformers(
    ours: Tokenizer,
    theirs: PreTrainedTokenizerBase,
    template: ChatTemplate,
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None,
) -> None:
    prefill = messages[-1] is ANSWER
    for thinking in (True, False):
        options = {"add_generation_prompt": not prefill, "enable_thinking": thinking}
        expected = theirs.apply_chat_template(
            messages, tools=tools, return_dict=False, continue_final_message=prefill, **options
        )
        prompt = template.render(normalise_messages(messages), tools=tools, enable_thinking=thinking)
        assert ours.encode(prompt) == expected


def test_end_of_turn_is_an_end_token(ours: Tokenizer, template: ChatTemplate) -> None:
    assert template.stop_words == ("<|im_end|>",)
    assert ours.token_to_id("<|im_end|>") in ours.eos_token_ids


def test_streams_join_to_transformers_text(ours: Tokenizer, theirs: PreTrainedTokenizerBase) -> None:
    ids = list(range(len(ours)))
    stream = IncrementalDetokenizer(ours)
    text = "".join([stream.feed([i]) for i in ids]) + stream.finish()
    assert text == theirs.decode(ids, skip_special_tokens=True)
