"""`cache_salt`: tenants of one server do not learn from its prefix cache what others have asked."""

from __future__ import annotations

import openai
import pytest

from tests.server.test_chat import MODEL

TEXT = "one two three four five six seven eight nine ten " * 8  # more than a page


def chat(client, text, **body):
    messages = [{"role": "user", "content": text}]
    answer = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=1, extra_body=body)
    return answer.usage.prompt_tokens_details.cached_tokens


def complete(client, text, **body):
    answer = client.completions.create(model=MODEL, prompt=text, max_tokens=1, extra_body=body)
    return answer.usage.prompt_tokens_details.cached_tokens


def respond(client, text, **body):
    answer = client.responses.create(model=MODEL, input=text, max_output_tokens=1, extra_body=body)
    return answer.usage.input_tokens_details.cached_tokens


@pytest.mark.parametrize("ask", [chat, complete, respond])
def test_a_prompt_is_cached_for_its_own_salt_alone(client, ask):
    text = ask.__name__ + TEXT
    for body in ({"cache_salt": "a" * 43}, {"cache_salt": "b" * 43}, {}):
        assert ask(client, text, **body) == 0
        assert ask(client, text, **body) >= 64


@pytest.mark.parametrize("ask", [chat, complete, respond])
@pytest.mark.parametrize("salt", ["", 5])
def test_a_salt_is_a_text_of_some_length(client, ask, salt):
    with pytest.raises(openai.BadRequestError, match="cache_salt"):
        ask(client, TEXT, cache_salt=salt)
