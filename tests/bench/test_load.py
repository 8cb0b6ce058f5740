"""The load generator against a small server that answers by a script."""

from __future__ import annotations

import asyncio
import json
import threading

import pytest
from aiohttp import web

from lmdeploy_jax.bench.load import Arrivals, Target, ids_below, model_name, run, summary
from lmdeploy_jax.bench.workloads import Job
from lmdeploy_jax.cli.main import main
from lmdeploy_jax.errors import EngineError

KEY = "secret"


class ScriptedServer:
    """Streams a word a token; counts how many requests run at a time. Prompts that begin with 999 fail, and
    those with tokens that the vocabulary lacks are refused.
    """

    def __init__(self, vocabulary=30000, broken=False):
        self.vocabulary, self.broken = vocabulary, broken
        self.running = self.most = 0
        self.bodies = []
        self._loop = asyncio.new_event_loop()
        started = threading.Event()
        threading.Thread(target=self._serve, args=(started,), daemon=True).start()
        started.wait()

    def _serve(self, started):
        asyncio.set_event_loop(self._loop)
        app = web.Application()
        app.router.add_post("/v1/completions", self.complete)
        app.router.add_get("/v1/models", self.models)
        runner = web.AppRunner(app)
        self._loop.run_until_complete(runner.setup())
        site = web.TCPSite(runner, "127.0.0.1", 0)
        self._loop.run_until_complete(site.start())
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        started.set()
        self._loop.run_forever()

    async def models(self, request):
        return web.json_response({"data": [{"id": "scripted"}]})

    async def complete(self, request):
        if request.headers.get("Authorization") != f"Bearer {KEY}":
            return web.json_response({"error": {"message": "no key"}}, status=401)
        body = await request.json()
        self.bodies.append(body)
        if max(body["prompt"]) >= self.vocabulary:
            return web.json_response({"error": {"message": "no such token"}}, status=400)
        self.running += 1
        self.most = max(self.most, self.running)
        response = web.StreamResponse()
        await response.prepare(request)
        count = body["max_tokens"]
        for _ in range(count):
            await asyncio.sleep(0.01)
            await response.write(event({"choices": [{"text": "word "}]}))
        if self.broken or body["prompt"][0] == 999:
            await response.write(event({"error": {"message": "it broke"}}))
        else:
            await response.write(event({"choices": [], "usage": {"completion_tokens": count}}))
        await response.write(b"data: [DONE]\n\n")
        self.running -= 1
        return response


def event(payload):
    return b"data: " + json.dumps(payload).encode() + b"\n\n"


@pytest.fixture
def server():
    return ScriptedServer()


def test_every_token_is_counted_and_timed(server):
    jobs = [Job([1, 2], 5), Job([3], 3)]
    wall, answers = run(Target(server.url, "scripted", KEY), jobs, Arrivals())
    assert [a.tokens for a in answers] == [5, 3]
    assert [len(a.pieces) for a in answers] == [5, 3]
    figures = summary(jobs, wall, answers)
    assert (figures["failed"], figures["out_tok"], figures["in_tok"]) == (0, 8, 3)
    assert figures["ttft_ms"]["p50"] >= 10
    # A piece that is read late shortens the time to the next one, but not the whole.
    assert all(a.pieces[-1] - a.sent >= 0.01 * a.tokens for a in answers)
    each = [(a.pieces[-1] - a.pieces[0]) / (a.tokens - 1) for a in answers]
    assert figures["tpot_ms"]["mean"] == pytest.approx(1000 * sum(each) / len(each), rel=1e-2)
    assert server.bodies[0]["ignore_eos"] is True


def test_concurrency_is_a_bound(server):
    run(Target(server.url, "scripted", KEY), [Job([1], 2)] * 9, Arrivals(concurrency=3))
    assert server.most == 3


def test_failures_are_told_apart(server):
    jobs = [Job([1], 2), Job([999], 2)]
    wall, answers = run(Target(server.url, "scripted", KEY), jobs, Arrivals())
    assert [a.error for a in answers] == [None, "it broke"]
    assert summary(jobs, wall, answers)["failed"] == 1


def test_a_refused_request_says_why(server):
    _, answers = run(Target(server.url, "scripted"), [Job([1], 2)], Arrivals())
    assert "401" in answers[0].error
    assert "no key" in answers[0].error


def test_arrivals_are_poisson():
    times = Arrivals(rate=50.0, seed=3).times(2000)
    assert times == sorted(times)
    assert times[-1] == pytest.approx(2000 / 50, rel=0.1)
    assert Arrivals().times(3) == [0.0, 0.0, 0.0]


def test_the_model_is_asked_for(server):
    assert model_name(server.url) == "scripted"
    with pytest.raises(EngineError, match="No server answers"):
        model_name("http://127.0.0.1:1")


@pytest.mark.parametrize(("vocabulary", "bound"), [(30000, 30000), (2560, 1875), (7, 7), (0, 30000)])
def test_the_work_fits_any_vocabulary(vocabulary, bound):
    server = ScriptedServer(vocabulary)
    assert ids_below(Target(server.url, "scripted", KEY)) == bound


def bench_serve(server, capsys):
    """The command's exit code and its only line of figures."""
    flags = ["--workloads=smoke", "--reps=1", "--api-key", KEY]
    code = main(["bench", "serve", server.url, *flags])
    (line,) = map(json.loads, capsys.readouterr().out.splitlines())
    return code, line


def test_bench_serve_of_a_small_vocabulary(capsys):
    code, line = bench_serve(ScriptedServer(2560), capsys)
    assert (code, line["failed"], line["out_tok"], line["ids_below"]) == (0, 0, 32, 1875)


def test_requests_that_fail_end_in_exit_code_1(capsys):
    code, line = bench_serve(ScriptedServer(broken=True), capsys)
    assert (code, line["failed"]) == (1, 4)
    assert "ids_below" not in line
