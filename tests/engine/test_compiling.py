"""Requests whose grammars are being compiled: others overtake them, and an abort finds them."""

from __future__ import annotations

import threading

import pytest

from lmdeploy_jax.assets import TINY_CHAT
from lmdeploy_jax.engine.process.compiling import CompilingRequests
from lmdeploy_jax.engine.request import Request, SamplingParams
from lmdeploy_jax.errors import EngineError, RequestError
from lmdeploy_jax.prompt import EncodedPrompt
from tests.engine.harness import PATIENCE, Collector, submit
from tests.fake_engine import FakeEngine


class Panic(BaseException):
    """As a library written in Rust raises it: no Exception."""


class GatedGrammars:
    """Compiles nothing, once `gate` is open. A text that begins with "known" is there at once."""

    def __init__(self) -> None:
        self.gate = threading.Event()

    def has(self, text: str) -> bool:
        return text.startswith("known")

    def compiled(self, source: tuple[str, int]) -> str:
        assert self.has(source[0]) or self.gate.wait(PATIENCE)
        if source[0] == "bad":
            raise RequestError("bad grammar")
        if source[0] == "panic":
            raise Panic("bad tokenizer")
        return source[0]


@pytest.fixture
def engine():
    engine = FakeEngine(TINY_CHAT, lambda request, index: iter(range(10**9)))
    yield engine
    engine.close()


@pytest.fixture
def compiling(engine):
    compiling = CompilingRequests(engine)
    compiling._grammars = GatedGrammars()
    yield compiling
    compiling._grammars.gate.set()
    compiling.close()


def guided(compiling: CompilingRequests, text: str, n: int = 1, tokens: int = 5) -> tuple[Request, Collector]:
    collector = Collector(n)
    request = Request(EncodedPrompt([5]), SamplingParams(max_new_tokens=tokens, n=n), collector)
    compiling.submit(request, (text, 1))
    return request, collector


def test_others_overtake(engine, compiling):
    found = [guided(compiling, f"dear {i}") for i in range(9)]  # more than there are threads
    plain = Collector()
    submit(engine, [5], plain, max_new_tokens=5)
    assert plain.wait()[0].reason == "length"
    assert guided(compiling, "known")[1].wait()[0].reason == "length"
    assert not any(collector.results[0].outputs for _, collector in found)
    compiling._grammars.gate.set()
    for request, collector in found:
        assert collector.wait()[0].reason == "length"
        assert request.params.grammar.startswith("dear")


def test_an_abort_takes_effect_at_once(engine, compiling):
    request, collector = guided(compiling, "dear", n=2)
    assert compiling.abort(request.request_id, None)
    assert [result.reason for result in collector.wait()] == ["abort", "abort"]
    compiling._grammars.gate.set()
    assert guided(compiling, "dear")[1].wait()[0].reason == "length"
    assert request not in engine.seen
    assert not compiling.abort(request.request_id, None)


def test_one_sequence_may_be_aborted(compiling):
    request, collector = guided(compiling, "dear", n=2, tokens=50)
    assert compiling.abort(request.request_id, 1)
    compiling._grammars.gate.set()
    assert [result.reason for result in collector.wait()] == ["length", "abort"]


def test_what_cannot_be_compiled_or_submitted_is_told(engine, compiling):
    compiling._grammars.gate.set()
    assert "bad grammar" in str(guided(compiling, "bad")[1].wait()[0].last.error)
    assert "bad tokenizer" in str(guided(compiling, "panic")[1].wait()[0].last.error)
    engine.close()
    assert isinstance(guided(compiling, "good")[1].wait()[0].last.error, EngineError)
