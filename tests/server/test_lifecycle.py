"""Clients that hang up, servers that go down, engines that sleep or crash."""

from __future__ import annotations

import itertools
import json
import socket
import threading

import httpx
import openai
import pytest

from tests import patience
from tests.patience import PATIENCE, wait_until
from tests.scripted import ENDLESS, endless
from tests.server.live import serving
from tests.server.scripted import scripted
from tests.server.test_chat import ASK, MODEL

CHAT = "/v1/chat/completions"
LONG = {"messages": ASK, "ignore_eos": True, "max_tokens": 400}


def send(live, body, path=CHAT):
    """A connection that has sent a request."""
    raw = json.dumps(body).encode()
    connection = socket.create_connection(("127.0.0.1", int(live.url.rsplit(":", 1)[1])))
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(raw)}"
    connection.sendall(head.encode() + b"\r\n\r\n" + raw)
    return connection


def settled(live, pipe):
    """Whether nothing runs and every page is back."""
    scheduler = pipe.frontend.engine.scheduler
    return not live.service.running and not scheduler.has_work and not scheduler.cache.pool.used


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_frees_everything(live, pipe, stream):
    connection = send(live, LONG | {"stream": stream, "n": 2})
    scheduler = pipe.frontend.engine.scheduler
    wait_until(lambda: len(scheduler.running) == 2)
    if stream:
        assert connection.recv(1000)
    connection.close()
    wait_until(lambda: settled(live, pipe))
    scheduler.check_integrity()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "hi", "n": 2}),
        ("/v1/responses", {"input": "hi"}),
        ("/v1/messages", {"messages": ASK, "max_tokens": 10**6}),
        ("/generate", {"prompt": "hi", "max_tokens": 10**6}),
        ("/get_ppl", {"input": "hi there"}),
        ("/v1/embeddings", {"input": ["hi", "there"]}),
    ],
)
def test_hanging_up_ends_the_work_of_every_route(path, body, stream):
    with scripted(unending, session_len=10**7) as (frontend, engine), serving(frontend) as live:
        engine.gate.clear()  # so that what is short does not end before
        connection = send(live, body | {"stream": stream}, path)
        wait_until(lambda: engine.seen)
        connection.close()
        wait_until(lambda: engine.aborted)
        engine.gate.set()
        wait_until(lambda: not live.service.running and engine.idle)


def test_generation_stops_within_two_steps_of_the_hang_up(monkeypatch):
    monkeypatch.setattr("tests.fake_engine.STEP", 0.05)  # as long as a step of a large model
    drawn = []

    def counting(request, index):
        for token in ENDLESS:
            drawn.append(token)
            yield token

    with scripted(counting) as (frontend, engine), serving(frontend) as live:
        connection = send(live, LONG | {"stream": True})
        connection.recv(1000)
        before = len(drawn)
        connection.close()
        wait_until(lambda: engine.idle)
        assert len(drawn) - before <= 2
        assert not live.service.running


def test_hanging_up_in_the_queue(live, pipe):
    connections = [send(live, LONG | {"stream": i % 2 == 0}) for i in range(20)]
    wait_until(lambda: live.service.running == 20)
    for connection in connections:
        connection.close()
    wait_until(lambda: settled(live, pipe))


def test_sigterm_lets_answers_finish():
    with scripted(endless) as (frontend, engine), serving(frontend) as live:
        engine.gate.clear()
        answers = []

        def ask():
            answers.append(patience.post(live.url + CHAT, json=LONG | {"max_tokens": 5}))

        thread = threading.Thread(target=ask)
        thread.start()
        wait_until(lambda: live.service.running == 1)
        live.server.should_exit = True
        wait_until(lambda: live.service.draining)
        assert live.service.health[0] == "draining"
        with pytest.raises(httpx.TransportError):
            patience.get(live.url + "/health")
        engine.gate.set()
        thread.join()
        assert answers[0].json()["choices"][0]["finish_reason"] == "length"


def test_at_the_deadline_answers_are_cut_with_a_proper_ending():
    with scripted(endless) as (frontend, _), serving(frontend, drain_seconds=0.2) as live:
        client = openai.OpenAI(base_url=live.url + "/v1", api_key="x", max_retries=0)
        body = {"model": "", "messages": ASK, "extra_body": {"ignore_eos": True}}
        stream = client.chat.completions.create(**body, stream=True)
        next(stream)
        live.server.should_exit = True
        chunks = list(stream)
        assert chunks[-1].choices[0].finish_reason == "abort"


def unending(request, index):
    return itertools.repeat(5)


def test_a_crash_ends_what_runs_and_shows_in_health():
    endless_answer = LONG | {"max_tokens": 10**6}  # so that neither ends before the crash
    with scripted(unending, session_len=10**7) as (frontend, engine), serving(frontend) as live:
        answers, begun = {}, threading.Event()

        def ask():
            answers["whole"] = patience.post(live.url + CHAT, json=endless_answer)

        def read_along():
            with patience.stream("POST", live.url + CHAT, json=endless_answer | {"stream": True}) as answer:
                lines = answer.iter_lines()
                next(lines)
                begun.set()
                answers["events"] = "".join(lines)

        threads = [threading.Thread(target=work) for work in (ask, read_along)]
        for thread in threads:
            thread.start()
        wait_until(lambda: begun.is_set() and len(engine._live) == 2)
        engine.crash()
        for thread in threads:
            thread.join()
        assert answers["whole"].status_code == 503
        assert answers["whole"].json()["error"]["code"] == "engine_unavailable"
        assert '"code":"engine_unavailable"' in answers["events"]
        assert patience.get(live.url + "/health").status_code == 503
        assert patience.post(live.url + CHAT, json=LONG).status_code == 503


@pytest.mark.parametrize("level", [1, 2])
def test_sleep_gives_memory_back_and_waking_restores_it(live, client, pipe, level):
    def ask():
        return client.chat.completions.create(model=MODEL, messages=ASK).choices[0].message.content

    before = ask()
    state = pipe.frontend.engine._runner.state
    with httpx.Client(base_url=live.url, timeout=PATIENCE) as http:
        assert http.post("/sleep", params={"level": level}).json() == {"is_sleeping": True}
        assert state.leaves == state.caches == ()
        assert http.get("/health").json()["status"] == "sleeping"
        with pytest.raises(openai.InternalServerError, match="sleeping") as caught:
            ask()
        assert caught.value.status_code == 503
        assert http.post("/wakeup", params={"tags": "weights"}).json() == {"is_sleeping": True}
        assert http.post("/wakeup").json() == {"is_sleeping": False}
        assert http.get("/is_sleeping").json() == {"is_sleeping": False}
        assert http.post("/sleep", params={"level": 3}).status_code == 400
    assert ask() == before


def test_sleep_aborts_what_runs(live, pipe):
    answers = []
    thread = threading.Thread(target=lambda: answers.append(patience.post(live.url + CHAT, json=LONG)))
    thread.start()
    wait_until(lambda: pipe.frontend.engine.scheduler.running)
    patience.post(live.url + "/sleep")
    thread.join()
    patience.post(live.url + "/wakeup")
    assert answers[0].json()["choices"][0]["finish_reason"] == "abort"
    assert settled(live, pipe)


def test_requests_are_aborted_by_session_and_all_together():
    options = {"enable_abort_handling": True}
    with scripted(endless) as (frontend, engine), serving(frontend, **options) as live:
        url = live.url + "/abort_request"
        assert patience.post(url, json={"session_id": 7}).status_code == 400
        assert patience.post(url, json={}).status_code == 400
        engine.gate.clear()
        for body in ({"session_id": 7}, {"abort_all": True}):
            answers = []
            thread = threading.Thread(
                target=lambda found: found.append(
                    patience.post(live.url + CHAT, json=LONG | {"session_id": 7})
                ),
                args=(answers,),
            )
            thread.start()
            wait_until(lambda: live.service.running == 1)
            wait_until(lambda: engine._live)
            assert patience.post(url, json=body).json() == {"aborted": 1}
            thread.join()
            assert answers[0].json()["choices"][0]["finish_reason"] == "abort"


def test_ending_and_aborting_must_be_allowed(live):
    assert patience.get(live.url + "/terminate").status_code == 400
    assert patience.post(live.url + "/abort_request", json={"abort_all": True}).status_code == 501
