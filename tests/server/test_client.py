"""LMDeploy's client, and `chat --url`."""

from __future__ import annotations

import pytest

from lmdeploy_jax.cli.main import main
from lmdeploy_jax.client import APIClient
from lmdeploy_jax.errors import EngineError, RequestError
from tests.scripted import ids
from tests.server.live import serving
from tests.server.scripted import scripted

ASK = [{"role": "user", "content": "What is 12 + 30?"}]


@pytest.fixture
def api(live):
    client = APIClient(live.url)
    yield client
    client.close()


def test_chat_completions(api, pipe):
    (model,) = api.available_models
    (whole,) = api.chat_completions_v1(model, ASK, temperature=0)
    text = whole["choices"][0]["message"]["content"]
    assert text == pipe("What is 12 + 30?").text
    chunks = list(api.chat_completions_v1(model, ASK, stream=True, temperature=0))
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == text


def test_lines_within_an_answer_end_no_event():
    said = "one\u2028two\x85three\x0bfour\r\nfive"
    with scripted(lambda request, index: ids(said)) as (frontend, _), serving(frontend) as live:
        client = APIClient(live.url)
        chunks = list(client.chat_completions_v1("tiny-chat", ASK, stream=True))
        client.close()
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == said


def test_errors_say_what_the_server_says(api):
    with pytest.raises(RequestError, match="404: The model 'other' does not exist"):
        list(api.chat_completions_v1("other", ASK, stream=True))
    with pytest.raises(RequestError, match="temperature"):
        list(api.chat_completions_v1("tiny-chat", ASK, temperature=9))
    with pytest.raises(EngineError, match="No server answers at"):
        _ = APIClient("http://127.0.0.1:1").available_models


def test_chat_with_a_server(live, capsys, pipe):
    assert main(["chat", "--url", live.url, "--temperature", "0", "--prompt", "What is 12 + 30?"]) == 0
    assert capsys.readouterr().out.strip() == pipe("What is 12 + 30?").text


def test_chat_remembers(live, capsys, monkeypatch):
    lines = iter(["My name is Anna.", "", "What is my name?", "", "exit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    assert main(["chat", "--url", live.url, "--temperature", "0"]) == 0
    assert "Anna" in capsys.readouterr().out.splitlines()[-1]
