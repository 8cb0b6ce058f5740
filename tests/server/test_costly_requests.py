"""What a body or a head may cost: the first fault of a list ends its check, and a head has a limit."""

from __future__ import annotations

import json
import socket
from urllib.parse import urlsplit

import pytest
from pydantic import ValidationError

from lmdeploy_jax.server.anthropic.bodies import MessagesRequest
from lmdeploy_jax.server.completions.bodies import CompletionRequest
from lmdeploy_jax.server.embeddings.bodies import EmbeddingsRequest
from lmdeploy_jax.server.http.header_limit import MAX_HEADER_BYTES
from lmdeploy_jax.server.native.bodies import GenerateRequest
from lmdeploy_jax.server.openai_chat.bodies import ChatCompletionRequest
from lmdeploy_jax.server.responses.bodies import ResponsesRequest
from lmdeploy_jax.server.tokens.bodies import DetokenizeRequest, EncodeRequest
from tests.patience import PATIENCE

MANY = 2000
TALK = {"max_tokens": 1, "messages": [{"role": "user", "content": "hi"}]}
NO_CHOICE = {"type": "choice", "choice": [1] * MANY}


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (ChatCompletionRequest, {"messages": [1] * MANY}),
        (ChatCompletionRequest, TALK | {"tools": [1] * MANY}),
        (ChatCompletionRequest, TALK | {"stop": [1] * MANY}),
        (ChatCompletionRequest, TALK | {"response_format": NO_CHOICE}),
        (ChatCompletionRequest, TALK | {"logit_bias": {f"x{i}": 1 for i in range(MANY)}}),
        (ChatCompletionRequest, TALK | {"logit_bias": {str(i): [] for i in range(MANY)}}),
        (CompletionRequest, {"prompt": [1.5] * MANY}),
        (CompletionRequest, {"prompt": [[1]] * MANY + [["a"] * MANY]}),
        (EmbeddingsRequest, {"input": [{}] * MANY}),
        (EncodeRequest, {"input": [1] * MANY}),
        (GenerateRequest, {"input_ids": [{}] * MANY}),
        (DetokenizeRequest, {"tokens": ["a"] * MANY}),
        (ResponsesRequest, {"input": [1] * MANY}),
        (MessagesRequest, {"max_tokens": 1, "messages": [1] * MANY}),
        (MessagesRequest, {"max_tokens": 1, "messages": [{"role": "user", "content": [1] * MANY}]}),
    ],
)
def test_a_long_list_of_faults_gives_few_errors(kind, body):
    with pytest.raises(ValidationError) as caught:
        kind.model_validate(body)
    assert 0 < len(caught.value.errors()) < 10


def test_a_large_bias_without_faults_is_taken():
    bias = {str(i): 0.5 for i in range(-3, MANY)}
    assert len(ChatCompletionRequest.model_validate(TALK | {"logit_bias": bias}).logit_bias or {}) == MANY + 3


def ask(url: str, head: bytes) -> bytes:
    """The answer to a head that is followed by a good body."""
    body = json.dumps(TALK).encode()
    place = urlsplit(url)
    with socket.create_connection((place.hostname, place.port), timeout=PATIENCE) as connection:
        start = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        end = b"connection: close\r\ncontent-length: %d\r\n\r\n" % len(body)
        connection.sendall(start + head + end + body)
        answer = b""
        while part := connection.recv(65536):
            answer += part
        return answer


@pytest.mark.parametrize(
    "head",
    [
        b"".join(b"x-%d: 1\r\n" % i for i in range(MAX_HEADER_BYTES // 5)),
        b"x: 1\r\n" * MAX_HEADER_BYTES,
        b"x: 1\r\n" * 20 * MAX_HEADER_BYTES,
        b"x: " + b"a" * (MAX_HEADER_BYTES + 1) + b"\r\n",
    ],
)
def test_a_head_that_is_too_large_is_refused(live, head):
    answer = ask(live.url, head)
    assert answer.startswith(b"HTTP/1.1 431 ")
    assert (
        f"at most {MAX_HEADER_BYTES} bytes"
        in json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"]
    )
    assert ask(live.url, b"").startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("head", [b"x-a: 1\r\n" * 1000, b"x: " + b"a" * (MAX_HEADER_BYTES - 1000) + b"\r\n"])
def test_a_head_within_the_limit_is_taken(live, head):
    assert ask(live.url, head).startswith(b"HTTP/1.1 200 ")


def test_a_head_that_never_ends_is_refused(live):
    place = urlsplit(live.url)
    with socket.create_connection((place.hostname, place.port), timeout=PATIENCE) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nx: ")
        with pytest.raises(OSError, match=r"reset|[Bb]roken|abort"):
            drip(connection)


def drip(connection: socket.socket) -> None:
    """Send more of a head for ever."""
    while True:
        connection.sendall(b"a" * 65536)
