"""Keys, limits and what errors look like."""

from __future__ import annotations

import itertools
import logging
import threading

import httpx
import openai
import pytest

from lmdeploy_jax.server.service import MOST_ANSWERS
from tests import patience
from tests.patience import PATIENCE, wait_until
from tests.scripted import TOKENIZER, endless, ids
from tests.server.live import begun, serving
from tests.server.scripted import scripted

CHAT = "/v1/chat/completions"
HI = {"messages": [{"role": "user", "content": "hi"}]}
ORIGIN = {"origin": "http://elsewhere"}


def say(request, index):
    return ids("hello there")


def error(response):
    return response.json()["error"]


@pytest.fixture(scope="module")
def guarded():
    with (
        scripted(say) as (frontend, _),
        serving(frontend, api_keys=("k1", "k2"), max_body_size=2000, strict=True) as live,
        httpx.Client(base_url=live.url, timeout=PATIENCE) as http,
    ):
        yield http


@pytest.mark.parametrize("headers", [{"authorization": "Bearer k2"}, {"x-api-key": "k1"}])
def test_a_key_opens(guarded, headers):
    assert guarded.post(CHAT, json=HI, headers=headers).status_code == 200


@pytest.mark.parametrize("headers", [{}, {"authorization": "Bearer k3"}, {"x-api-key": ""}])
def test_without_a_key_nothing_is_told_but_why(guarded, headers):
    answer = guarded.post(CHAT, json=HI, headers=headers | ORIGIN)
    assert answer.status_code == 401
    assert error(answer)["type"] == "authentication_error"
    assert answer.headers["access-control-allow-origin"] == "*"
    assert guarded.get("/v1/models", headers=headers).status_code == 401
    assert guarded.get("/metrics", headers=headers).status_code == 401
    assert guarded.get("/health", headers=headers).status_code == 200
    preflight = ORIGIN | {"access-control-request-method": "POST"}
    assert guarded.options(CHAT, headers=preflight).status_code == 200


def test_the_limit_of_a_body_is_16_mb_unless_told(live):
    assert b" 413 " in begun(live.url, (16 << 20) + 1)


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_is_too_large(guarded, chunked):
    body = b'{"messages": "' + b"a" * 3000 + b'"}'
    content = iter([body[:1500], body[1500:]]) if chunked else body
    headers = {"x-api-key": "k1", "content-type": "application/json"} | ORIGIN
    answer = guarded.post(CHAT, content=content, headers=headers)
    assert answer.status_code == 413
    assert error(answer)["code"] == "body_too_large"
    assert "at most 2000 bytes" in error(answer)["message"]
    assert answer.headers["access-control-allow-origin"] == "*"
    small = guarded.post(CHAT, content=iter([b'{"messages":', b'"a"}']), headers=headers)
    assert small.status_code == 200


def test_strict_refuses_unknown_fields(guarded):
    answer = guarded.post(CHAT, json=HI | {"colour": 1}, headers={"x-api-key": "k1"})
    assert (answer.status_code, error(answer)["param"]) == (400, "colour")


@pytest.fixture(scope="module")
def plain():
    with (
        scripted(say) as (frontend, engine),
        serving(frontend) as live,
        httpx.Client(base_url=live.url, timeout=PATIENCE) as http,
    ):
        yield http, live, engine


def test_unknown_fields_are_ignored_with_one_line(plain, caplog):
    http, _, _ = plain
    with caplog.at_level(logging.WARNING, "lmdeploy_jax"):
        for _ in range(3):
            assert http.post(CHAT, json=HI | {"colour": 1, "shape": 2}).status_code == 200
    assert [r.getMessage() for r in caplog.records] == [
        "unknown request fields are ignored: 'colour', 'shape'"
    ]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": []}, "messages"),
        (HI | {"temperature": "warm"}, "temperature"),
        (HI | {"temperature": 3}, "temperature"),
        (HI | {"top_p": -1}, "top_p"),
        (HI | {"n": 0}, "n"),
        (HI | {"n": 100}, None),
        (HI | {"stop": ""}, "stop"),
        (HI | {"stop": "a" * 1_000_000}, None),
        (HI | {"stop": ["a", "b"] * 1000}, None),
        (HI | {"bad_words": ["a" * 1_000_000]}, None),
        (HI | {"top_logprobs": 3}, "top_logprobs"),
        (HI | {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        (HI | {"logit_bias": {"x": 1}}, "logit_bias.x"),
        (HI | {"logit_bias": {"99999": 1}}, None),
        (HI | {"response_format": {"type": "poem"}}, "response_format.type"),
        (HI | {"response_format": {"type": "json_schema"}}, None),
        (HI | {"functions": [{"name": "f"}]}, "functions"),
        (HI | {"tool_choice": "required"}, None),
        ({"messages": [{"role": "king", "content": "hi"}]}, None),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, None),
        ([], None),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_requests(plain, body, param, stream):
    http, _, _ = plain
    answer = http.post(CHAT, json=body | {"stream": stream} if isinstance(body, dict) else body)
    assert answer.status_code == 400
    found = error(answer)
    assert found["type"] == "invalid_request_error"
    assert found["message"]
    assert set(found) == {"message", "type", "param", "code"}
    if param is not None:
        assert found["param"] == param


@pytest.mark.parametrize("content", [b"", b"{", b'{"messages": "\\ud800"}', b"\xff"])
def test_bodies_that_are_no_json(plain, content):
    http, _, _ = plain
    answer = http.post(CHAT, content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert error(answer)["message"]


def test_other_paths_and_methods(plain):
    http, _, _ = plain
    assert error(http.get("/nowhere", headers=ORIGIN))["type"] == "not_found_error"
    assert http.get(CHAT).status_code == 405
    assert http.post(CHAT, content=b"x=1", headers={"content-type": "text/plain"}).status_code == 415


def test_what_nobody_foresaw_is_a_500_with_cors(plain, monkeypatch):
    http, live, _ = plain
    monkeypatch.setattr(live.service, "check_model", lambda name: 1 // 0)
    answer = http.post(CHAT, json=HI, headers=ORIGIN)
    assert answer.status_code == 500
    assert "ZeroDivision" not in answer.text
    assert answer.headers["access-control-allow-origin"] == "*"


def test_an_error_amid_a_stream_is_its_last_event(plain):
    http, _, engine = plain

    def fails(request, index):
        yield from ids("hello", stop=False)
        yield from ids(" world", stop=False)
        raise ValueError("broken")

    engine.script, before = fails, engine.script
    answer = http.post(CHAT, json=HI | {"stream": True})
    whole = http.post(CHAT, json=HI)
    engine.script = before
    assert answer.status_code == 200
    events = answer.text.strip().split("\n\n")
    assert events[-1] == "data: [DONE]"
    assert '"error"' in events[-2]
    assert "broken" not in answer.text
    assert whole.status_code == 500


def test_a_request_asks_for_no_millions_of_answers():
    with scripted(say) as (frontend, _), serving(frontend) as live:
        body = {"input": ["a"] * (MOST_ANSWERS + 1)}
        for path in ("/v1/embeddings", "/pooling"):
            answer = patience.post(live.url + path, json=body)
            assert answer.status_code == 400
            assert f"at most {MOST_ANSWERS}" in error(answer)["message"]


def test_a_full_queue_says_when_to_come_back():
    with (
        scripted(endless, max_batch_size=2) as (frontend, engine),
        serving(frontend, max_queued_requests=1) as live,
    ):
        engine.gate.clear()
        client = openai.OpenAI(base_url=live.url + "/v1", api_key="x", max_retries=0)
        threads = [
            threading.Thread(target=lambda: client.completions.create(model="", prompt="a", max_tokens=3))
            for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        wait_until(lambda: live.service.running == 3)
        with pytest.raises(openai.RateLimitError) as caught:
            client.completions.create(model="", prompt="a")
        assert caught.value.response.headers["retry-after"] == "1"
        assert caught.value.code == "queue_full"
        engine.gate.set()
        for thread in threads:
            thread.join()
        assert live.service.running == 0


def test_concurrency_limit_leaves_health_alone():
    with scripted(endless) as (frontend, engine), serving(frontend, max_concurrent_requests=1) as live:
        engine.gate.clear()
        answers = []

        def ask():
            answers.append(patience.post(live.url + CHAT, json=HI | {"max_tokens": 3}))

        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        wait_until(lambda: live.service.running == 1)
        for path in ("/health", "/metrics"):
            assert patience.get(live.url + path).status_code == 200
        assert live.service.running == 1
        engine.gate.set()
        for thread in threads:
            thread.join()
        assert [a.status_code for a in answers] == [200] * 3


def unending(request, index):
    return itertools.repeat(5)


@pytest.mark.parametrize("stream", [False, True])
def test_time_is_up(stream):
    sizes, options = {"session_len": 10**6}, {"request_timeout": 1}
    with scripted(unending, **sizes) as (frontend, engine), serving(frontend, **options) as live:
        answer = patience.post(live.url + CHAT, json=HI | {"stream": stream})
        assert "longer than 1 s" in answer.text
        assert answer.status_code == (200 if stream else 504)
        wait_until(lambda: engine.idle)


def test_the_tokens_of_a_script_are_the_tokenizers():
    assert TOKENIZER.decode(ids("hello there")) == "hello there"


def test_a_repetition_that_cannot_be_watched_is_refused(live):
    body = {"messages": "hi", "max_tokens": 3, "repetition_ngram_size": 2000, "repetition_ngram_threshold": 2}
    answer = patience.post(live.url + "/v1/chat/completions", json=body)
    assert answer.status_code == 400
    assert "2000" in answer.json()["error"]["message"]
    assert patience.get(live.url + "/health").status_code == 200
