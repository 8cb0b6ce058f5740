"""HTTP as clients, proxies and people with curl speak it."""

from __future__ import annotations

import gzip
import json
import logging
import socket
import zlib

import httpx
import openai
import pytest

from tests.patience import PATIENCE
from tests.scripted import ids
from tests.server.live import serving
from tests.server.scripted import scripted

CHAT = "/v1/chat/completions"
HI = {"messages": [{"role": "user", "content": "hi"}]}
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def server():
    with (
        scripted(lambda request, index: ids("hello there")) as (frontend, _),
        serving(frontend, max_body_size=10_000) as live,
        httpx.Client(base_url=live.url, timeout=PATIENCE) as http,
    ):
        yield http, live


def test_an_answer_has_the_requests_id(server):
    http, _ = server
    fresh = [http.get("/health").headers for _ in range(2)]
    assert fresh[0]["x-request-id"] == fresh[0]["request-id"] != fresh[1]["request-id"]
    for sent in ("x-request-id", "request-id"):
        answer = http.post("/v1/messages", json={}, headers={sent: "mine-1"})
        assert (answer.headers["x-request-id"], answer.headers["request-id"]) == ("mine-1", "mine-1")
        assert answer.json()["request_id"] == "mine-1"
    assert http.get("/health", headers={"x-request-id": "a b"}).headers["x-request-id"] != "a b"
    client = openai.OpenAI(base_url=f"{http.base_url}/v1", api_key="none")
    assert client.chat.completions.create(model="tiny-chat", **HI)._request_id.startswith("req_")


def test_a_path_is_one_line_of_the_log(server, caplog):
    http, _ = server
    with caplog.at_level(logging.DEBUG, "lmdeploy_jax"):
        assert http.get("/a%0ablank").status_code == 404
    assert any(record.getMessage().startswith(r"GET '/a\nblank': 404") for record in caplog.records)


def test_what_fails_is_logged_with_the_requests_id(server, monkeypatch, caplog):
    http, live = server
    monkeypatch.setattr(live.service, "check_model", lambda name: 1 // 0)
    with caplog.at_level(logging.ERROR, "lmdeploy_jax"):
        assert http.post(CHAT, json=HI, headers={"x-request-id": "mine-2"}).status_code == 500
    assert any("request mine-2 failed" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("path", ["/", "/health", "/v1/models", "/metrics"])
def test_head_is_get_without_a_body(server, path):
    http, _ = server
    answer, whole = http.head(path), http.get(path)
    assert (answer.status_code, answer.content) == (200, b"")
    assert answer.headers["content-type"] == whole.headers["content-type"]


def test_head_has_no_effect(server):
    http, _ = server
    assert http.head("/terminate").status_code == 405
    assert http.head(CHAT).status_code == 405


@pytest.mark.parametrize(
    "path",
    [
        *("/v1/models/", "/models", "/models/", "//v1/models", "/v1/v1/models", "/anthropic/v1/models"),
        "/anthropic/v1/models/",
    ],
)
def test_models_are_listed_wherever_clients_look(server, path):
    http, _ = server
    listed = http.get(f"{str(http.base_url).rstrip('/')}{path}").json()  # which may begin with two slashes
    (card,) = listed["data"]
    assert (card["id"], card["type"], card["display_name"]) == ("tiny-chat", "model", "tiny-chat")
    assert listed["has_more"] is False


@pytest.mark.parametrize("path", [CHAT + "/", "/chat/completions", "/v1" + CHAT, "/v1//chat/completions"])
def test_base_urls_are_written_in_many_ways(server, path):
    http, _ = server
    assert http.post(path, json=HI).json()["object"] == "chat.completion"


def test_a_path_that_means_nothing_is_not_found(server):
    http, _ = server
    assert http.get("/nowhere/").status_code == http.post("/v2/chat/completions", json=HI).status_code == 404
    prefixed = http.post("/anthropic/v1/messages", json=HI | {"max_tokens": 2})
    assert prefixed.json()["type"] == "message"


@pytest.mark.parametrize(("encoding", "encode"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
def test_compressed_bodies_are_read(server, encoding, encode):
    http, _ = server
    headers = JSON | {"content-encoding": encoding}

    def status(content):
        return http.post(CHAT, content=content, headers=headers).status_code

    body = encode(json.dumps(HI).encode())
    assert status(body) == 200
    assert status(body[:-3] if encoding == "deflate" else body[:-9]) == 400
    assert status(b"no such thing") == 400
    assert status(encode(b" " * 20_000)) == 413, "what it takes in memory counts"


def test_an_encoding_that_cannot_be_read_is_named(server):
    http, _ = server
    answer = http.post(CHAT, content=b"x", headers=JSON | {"content-encoding": "br"})
    assert (answer.status_code, "'br'" in answer.text) == (415, True)


@pytest.mark.parametrize(("given", "words"), [("text/plain", "is 'text/plain'"), (None, "is missing")])
def test_a_body_of_another_type_is_415(server, given, words):
    http, _ = server
    content = json.dumps(HI).encode()
    answer = http.post(CHAT, content=content, headers={"content-type": given} if given else {})
    assert answer.status_code == 415
    assert words in answer.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_of_http_1_0_gets_no_chunks(server, stream):
    http, _ = server
    body = json.dumps(HI | {"stream": stream}).encode()
    head = f"POST {CHAT} HTTP/1.0\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    with socket.create_connection((http.base_url.host, http.base_url.port), PATIENCE) as connection:
        connection.sendall(head.encode() + body)
        answer = b"".join(iter(lambda: connection.recv(4096), b""))
    headers, _, content = answer.partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in headers
    assert (b"content-length" in headers) is not stream
    if stream:
        lines = content.split(b"\n\n")
        assert (lines[-2:], {line[:6] for line in lines[:-1]}) == ([b"data: [DONE]", b""], {b"data: "})
    else:
        assert json.loads(content)["choices"][0]["message"]["content"] == "hello there"


@pytest.mark.parametrize("path", ["/v1/audio/speech", "/v1/audio/transcriptions", "/audio/translations"])
def test_there_is_no_speech(server, path):
    http, _ = server
    answer = http.post(path, files={"file": b"RIFF"}, data={"model": "whisper"})
    assert answer.status_code == 404
    assert "neither hears nor speaks" in answer.json()["error"]["message"]


def test_a_websocket_is_refused_without_a_word_in_the_log(server, caplog):
    http, _ = server
    upgrade = {"connection": "upgrade", "upgrade": "websocket"}
    with caplog.at_level(logging.INFO):
        assert http.get("/v1/realtime", headers=upgrade).status_code == 404
    assert not [record for record in caplog.records if record.name.startswith("uvicorn")]
