"""Answers in harmony's channels are read as messages whether or not tools are offered."""

from __future__ import annotations

import pytest

from lmdeploy_jax.errors import RequestError
from lmdeploy_jax.messages import GenerationConfig, Response
from lmdeploy_jax.server.chat.call import ChatCall
from lmdeploy_jax.server.chat.prepare import Chat
from lmdeploy_jax.text.conversation import normalise_messages
from lmdeploy_jax.text.parsers import collect, reasoning_format, tool_format
from lmdeploy_jax.text.prompts import Prompt
from lmdeploy_jax.vision.access import MediaAccess

ANSWER = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Four."


@pytest.fixture(scope="module")
def chat(pipe) -> Chat:
    return Chat(pipe.frontend, tool_format("gpt-oss"), reasoning_format("gpt-oss"), MediaAccess())


def call(form: dict | None) -> ChatCall:
    messages = normalise_messages([{"role": "user", "content": "What is 2 + 2?"}])
    return ChatCall(Prompt(messages=tuple(messages)), GenerationConfig(response_format=form))


@pytest.mark.parametrize("form", [None, {"type": "text"}])
def test_channels_are_read_without_tools(chat, form):
    read = chat.prepare(call(form)).reader(0)
    parsed = collect(read.read(Response(ANSWER, 9, 9, "stop")).events)
    assert (parsed.reasoning, parsed.content) == ("Hm.", "Four.")


def test_a_form_is_refused(chat):
    with pytest.raises(RequestError, match="response_format cannot be enforced in the channels"):
        chat.prepare(call({"type": "json_object"}))
