"""A proxy before servers whose model is a script: who gets what, and what clients see when a node goes."""

from __future__ import annotations

import asyncio
import http.client
import socket
import threading
from contextlib import ExitStack, contextmanager

import httpx
import openai
import pytest

from lmdeploy_jax.cli.main import main
from lmdeploy_jax.errors import ConfigError
from lmdeploy_jax.proxy.nodes import OBSERVED, STRIKES, Nodes, checked_url
from lmdeploy_jax.proxy.options import ProxyOptions
from lmdeploy_jax.proxy.run import Proxy
from lmdeploy_jax.server.errors import ApiError
from lmdeploy_jax.server.registration import reachable
from tests.patience import PATIENCE, wait_until
from tests.scripted import endless, ids
from tests.server.live import serving
from tests.server.scripted import scripted

ASKED = {"model": "tiny-chat", "messages": [{"role": "user", "content": "hi"}]}


def saying(text):
    return lambda request, index: ids(text)


@contextmanager
def proxied(**options):
    """A proxy on a port of its own, and its URL."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    proxy = Proxy(ProxyOptions(server_name="127.0.0.1", server_port=port, **options))
    proxy.config.port, proxy.config.host = port, "127.0.0.1"
    thread = threading.Thread(target=lambda: asyncio.run(proxy.serve()), daemon=True)
    thread.start()
    wait_until(lambda: proxy.started)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        proxy.should_exit = True
        thread.join(PATIENCE)
        assert not thread.is_alive()


@pytest.fixture
def two():
    """Two servers of one model that tell themselves apart, and their URLs."""
    with ExitStack() as stack:
        lives = []
        for text in ("one", "two"):
            frontend, _ = stack.enter_context(scripted(saying(text)))
            lives.append(stack.enter_context(serving(frontend)))
        yield lives


def text_of(answer):
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["message"]["content"]


def test_both_nodes_answer_and_the_official_client_streams(two):
    with proxied(nodes=[live.url for live in two]) as url:
        wait_until(lambda: httpx.get(url + "/health").status_code == 200)
        wait_until(lambda: all(x["models"] for x in httpx.get(url + "/nodes/status").json().values()))
        client = openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0)
        assert [model.id for model in client.models.list()] == ["tiny-chat"]
        assert {client.chat.completions.create(**ASKED).choices[0].message.content for _ in range(20)} == {
            "one",
            "two",
        }
        stream = client.chat.completions.create(**ASKED, stream=True)
        assert "".join(part.choices[0].delta.content or "" for part in stream) in ("one", "two")
        answered = httpx.post(url + "/v1/messages", json=ASKED | {"max_tokens": 5})
        assert answered.json()["content"][0]["text"] in ("one", "two")
        unknown = httpx.post(url + "/v1/chat/completions", json=ASKED | {"model": "other"})
        assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")


def test_a_node_that_has_gone_costs_no_request_and_is_left_out(two):
    with proxied(health_interval=0.05) as url:
        assert httpx.post(url + "/v1/chat/completions", json=ASKED).status_code == 503
        for live in two:
            assert httpx.post(url + "/nodes/add", json={"url": live.url}).status_code == 200
        two[0].stop()
        assert {text_of(httpx.post(url + "/v1/chat/completions", json=ASKED)) for _ in range(12)} == {"two"}
        wait_until(lambda: not httpx.get(url + "/nodes/status").json()[two[0].url]["healthy"])
        assert httpx.post(url + "/nodes/remove", json={"url": two[0].url}).status_code == 200
        assert list(httpx.get(url + "/nodes/status").json()) == [two[1].url]
        assert httpx.post(url + "/nodes/remove", json={"url": two[0].url}).status_code == 404


def test_a_full_node_passes_its_requests_to_another():
    with scripted(endless) as (full, engine), scripted(saying("free")) as (free, _), ExitStack() as stack:
        nodes = [
            stack.enter_context(serving(full, max_queued_requests=0)),
            stack.enter_context(serving(free)),
        ]
        engine.facts = engine.facts.__class__(**(vars(engine.facts) | {"max_batch_size": 1}))
        running = threading.Thread(
            target=lambda: httpx.post(
                nodes[0].url + "/v1/chat/completions", json=ASKED | {"max_tokens": 400}, timeout=PATIENCE
            )
        )
        running.start()
        wait_until(lambda: engine.stats.running)
        with proxied(nodes=[node.url for node in nodes], routing_strategy="random") as url:
            wait_until(lambda: all(x["models"] for x in httpx.get(url + "/nodes/status").json().values()))
            answers = [
                httpx.post(url + "/v1/chat/completions", json=ASKED | {"max_tokens": 5}) for _ in range(8)
            ]
            seen = httpx.get(url + "/nodes/status").json()
        running.join(PATIENCE)
    assert {answer.status_code for answer in answers} == {200}
    # A node that refuses at once is not the fastest.
    assert [len(seen[node.url]["latency"]) for node in nodes] == [0, 8]


def test_a_client_that_hangs_up_ends_its_answer_at_the_node():
    with scripted(endless) as (frontend, engine), serving(frontend) as live, proxied(nodes=[live.url]) as url:
        wait_until(lambda: httpx.get(url + "/health").status_code == 200)
        asked = ASKED | {"stream": True, "max_tokens": 400}
        with httpx.stream("POST", url + "/v1/chat/completions", json=asked) as answer:
            next(answer.iter_lines())
            wait_until(lambda: engine.stats.running == 1)
        wait_until(lambda: engine.stats.running == 0)
        assert engine.aborted
        wait_until(lambda: httpx.get(url + "/nodes/status").json()[live.url]["unfinished"] == 0)


def test_a_node_that_is_not_well_stays_left_out_however_often_it_registers():
    well = False

    def answer(head):
        return MODELS if well or "/health" not in head else b"HTTP/1.1 503 No\r\ncontent-length: 0\r\n\r\n"

    with raw_node(answer) as node, proxied(health_interval=0.05) as url:
        told = {"url": node, "status": {"models": ["tiny-chat"]}}

        def healthy():
            return httpx.get(url + "/nodes/status").json()[node]["healthy"]

        httpx.post(url + "/nodes/add", json=told | {"status": {"models": ["tiny-chat"], "speed": 2.0}})
        wait_until(lambda: not healthy())
        assert httpx.post(url + "/nodes/add", json=told).status_code == 200
        assert not healthy()
        assert httpx.get(url + "/nodes/status").json()[node]["speed"] == 2.0
        well = True
        httpx.post(url + "/nodes/add", json=told)
        assert healthy()


@contextmanager
def raw_node(answer):
    """A node that answers each request's head with bytes, and then hangs up."""

    async def serve(reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        writer.write(answer(head.decode()))
        await writer.drain()
        writer.close()

    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    server = asyncio.run_coroutine_threadsafe(asyncio.start_server(serve, "127.0.0.1", 0), loop).result()
    yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    loop.call_soon_threadsafe(server.close)


def with_body(kind, body, length=None):
    told = len(body) if length is None else length
    return b"HTTP/1.1 200 OK\r\ncontent-type: %b\r\ncontent-length: %d\r\n\r\n%b" % (kind, told, body)


MODELS = with_body(b"application/json", b'{"data": [{"id": "tiny-chat"}]}')


def test_a_node_that_ends_within_a_stream_ends_it_with_an_error():
    torn = with_body(b"text/event-stream", b"data: {}\n\n", 99)
    with (
        raw_node(lambda head: torn if head.startswith("POST") else MODELS) as node,
        proxied(nodes=[node]) as url,
    ):
        wait_until(lambda: httpx.get(url + "/health").status_code == 200)
        answer = httpx.post(url + "/v1/chat/completions", json=ASKED | {"stream": True})
    assert answer.text.startswith("data: {}\n\ndata: ")
    assert "ended in the middle" in answer.text


def test_a_request_and_its_answer_pass_as_they_are():
    heads = []
    answer = MODELS.replace(b"\r\n", "\r\nset-cookie: a=b\r\nx-name: 模型\r\n".encode(), 1)
    with raw_node(lambda head: heads.append(head.lower()) or answer) as node, proxied() as url:
        named = node.replace("127.0.0.1", "localhost")  # numbers have no cookies
        assert httpx.post(url + "/nodes/add", json={"url": named}).status_code == 200
        connection = http.client.HTTPConnection(url.removeprefix("http://"))
        for _ in range(2):
            connection.putrequest("GET", "/static/../a%2Fb%3Fc?d=%2B", skip_accept_encoding=True)
            connection.endheaders()
            with connection.getresponse() as told:
                assert told.read()
                assert told.headers["x-name"].encode("latin-1").decode() == "模型"
        connection.close()
    asked, again = (head for head in heads if "/static/../a%2fb%3fc?d=%2b http" in head)
    assert asked == again
    assert [line.partition(":")[0] for line in asked.split("\r\n")[1:-2]] == [
        "host",
        "x-forwarded-for",
        "x-forwarded-proto",
    ]


def test_a_server_registers_and_says_when_it_ends():
    with proxied() as url, scripted(saying("node")) as (frontend, _):
        with serving(frontend, proxy_url=url) as live:
            wait_until(lambda: live.url in httpx.get(url + "/nodes/status").json())
            assert text_of(httpx.post(url + "/v1/chat/completions", json=ASKED)) == "node"
        assert httpx.get(url + "/nodes/status").json() == {}


def test_nodes_are_ended_where_they_allow_it(two):
    asked = []
    with (
        raw_node(lambda head: asked.append(head.partition("\r\n")[0]) or MODELS) as node,
        proxied(nodes=[node, two[0].url]) as url,
    ):
        assert httpx.post(url + "/nodes/terminate", json={"url": node}).status_code == 200
        assert "GET /terminate HTTP/1.1" in asked
        refused = httpx.get(url + "/nodes/terminate_all")
        assert refused.status_code == 502
        assert "--allow-terminate-by-client" in refused.json()["error"]["message"]
        assert list(httpx.get(url + "/nodes/status").json()) == [two[0].url]


def test_keys_guard_the_nodes_too(two):
    with proxied(nodes=[two[0].url], api_keys=["secret"]) as url:
        assert httpx.get(url + "/nodes/status").status_code == 401
        assert httpx.get(url + "/nodes/status", headers={"x-api-key": "secret"}).status_code == 200


def test_browsers_may_call_from_other_origins(two):
    """The proxy's own routes and the nodes', whose keys a preflight does not bring."""
    origin, key = {"origin": "http://elsewhere"}, {"x-api-key": "secret"}
    preflight = origin | {
        "access-control-request-method": "POST",
        "access-control-request-headers": "x-api-key",
    }
    with proxied(nodes=[two[0].url], api_keys=["secret"]) as url:
        assert httpx.options(url + "/v1/chat/completions", headers=preflight).status_code == 200
        wait_until(lambda: httpx.get(url + "/health").status_code == 200)
        models = httpx.get(url + "/v1/models", headers=origin | key)
        answer = httpx.post(url + "/v1/chat/completions", json=ASKED, headers=origin | key)
        for each in (models, answer):
            assert each.status_code == 200
            assert each.headers.get_list("access-control-allow-origin") == ["*"]


def test_bad_nodes_are_named(two):
    with proxied() as url:
        for body, word in (
            ({}, "url=None"),
            ({"url": "ftp://a"}, "ftp"),
            ({"url": two[0].url, "status": {"speed": -1}}, "speed=-1"),
            ({"url": two[0].url, "status": {"models": "x"}}, "models='x'"),
            ({"url": "http://127.0.0.1:9"}, "does not say"),
        ):
            answer = httpx.post(url + "/nodes/add", json=body)
            assert answer.status_code in (400, 502)
            assert word in answer.json()["error"]["message"]


def nodes_of(strategy, count=4):
    nodes = Nodes(strategy)
    for i in range(count):
        nodes.add(f"http://n{i}", ("m",))
    return nodes


def test_strategies():
    expected, observed, prefix = (
        nodes_of(x) for x in ("min_expected_latency", "min_observed_latency", "prefix")
    )
    for i, node in enumerate(expected):
        node.unfinished, node.speed = 10 + i, 2.0 if i == 3 else 1.0
    assert expected.best(expected.candidates("m"), b"").url == "http://n3"
    for i, node in enumerate(observed):
        node.latencies.extend([5.0 - i] * (OBSERVED + 1) if i else [])
    assert observed.best(observed.candidates("m"), b"").url == "http://n0"
    homes = [prefix.best(prefix.candidates("m"), bytes([i])) for i in range(100)]
    assert homes == [prefix.best(prefix.candidates("m"), bytes([i])) for i in range(100)]
    assert len(set(homes)) == 4
    homes[0].failures = STRIKES
    moved = [prefix.best(prefix.candidates("m"), bytes([i])) for i in range(100)]
    assert all(new is old for new, old in zip(moved, homes, strict=True) if old is not homes[0])
    homes[0].failures, homes[0].unfinished = 0, 8
    assert prefix.best(prefix.candidates("m"), bytes([0])) is homes[0]
    homes[0].unfinished = 16
    assert prefix.best(prefix.candidates("m"), bytes([0])) is not homes[0]


@pytest.mark.parametrize("url", ["", "10.0.0.1:80", "http://a/v1", "http://u:p@a", "http://a:x", None, 3])
def test_what_is_no_address(url):
    with pytest.raises(ApiError, match="no node's address"):
        checked_url(url)


def test_what_a_proxy_is_told_of_a_server_that_listens_everywhere():
    for anywhere in ("http://0.0.0.0:23333", "http://[::]:23333", "http://:23333"):
        assert reachable(anywhere, "http://127.0.0.1:8000") == "http://127.0.0.1:23333"
    assert reachable("http://10.1.1.1:23333", "http://127.0.0.1:8000") == "http://10.1.1.1:23333"


def test_the_command_line(capsys):
    assert main(["serve", "proxy", "--serving-strategy", "DistServe"]) == 2
    assert main(["serve", "proxy", "--nodes", "nowhere"]) == 2
    assert main(["serve", "proxy", "--routing-strategy", "fastest"]) == 2
    assert main(["serve", "proxy", "--help"]) == 0
    assert "--routing-strategy" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="health_interval"):
        ProxyOptions(health_interval=0)
