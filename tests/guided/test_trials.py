"""Grammars that nobody can compile end the process that tries them, and nothing else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

from lmdeploy_jax.assets import TINY_CHAT
from lmdeploy_jax.errors import EngineError, RequestError
from lmdeploy_jax.guided import Grammars, after_reasoning, tool_grammar, trials
from lmdeploy_jax.guided.lru import LruCache
from lmdeploy_jax.guided.response_format import described
from lmdeploy_jax.guided.trials import Trials
from lmdeploy_jax.guided.vocabulary import Vocabulary
from lmdeploy_jax.text.parsers import reasoning_format, tool_format
from lmdeploy_jax.text.tokenizer import Tokenizer

DEAR = "start: A\nA: /(?s:.*)/ & ~/(?s:.*)(a|b.{50})(?s:.*)/"  # its automaton has 2**50 states
CHAIN = "start: r0\n" + "\n".join(f"r{i}: r{i + 1}" for i in range(20_000)) + '\nr20000: "a"'
FINE = 'start: "a"'
ROOT = Path(__file__).parents[2]
TOKENIZER = Tokenizer(TINY_CHAT)


def vocabulary() -> Vocabulary:
    return Vocabulary.of(TOKENIZER, 2570)


@pytest.fixture(scope="module")
def tried() -> Trials:
    return Trials(vocabulary)


def test_what_takes_too_long_is_given_up_and_holds_nobody_up():
    grammars, refusals = Grammars(TOKENIZER, 2570), []

    def dear() -> None:
        with pytest.raises(RequestError) as caught:
            grammars.compile({"type": "grammar", "grammar": DEAR})
        refusals.append(str(caught.value))

    thread = threading.Thread(target=dear)
    thread.start()
    for text in "abc":
        assert grammars.compile({"type": "choice", "choice": [text]}) is not None
    thread.join()
    assert refusals == ["response_format of type 'grammar' cannot be used: it takes more than 3 s to compile"]


def test_what_costs_too_much_is_named():
    reasoning = reasoning_format("default")
    wrapped = after_reasoning({"type": "grammar", "grammar": DEAR}, TOKENIZER, reasoning, True)
    assert described(wrapped) == "response_format of type 'grammar'"
    tools = [{"type": "function", "function": {"name": "now"}}]
    assert described(tool_grammar(tool_format("qwen"), tools, TOKENIZER)) == "tools"


def test_a_stack_that_overflows_is_a_verdict(tried):
    verdict = tried.of(CHAIN)
    assert (verdict.fault, verdict.died) == ("it is nested too deeply to compile", True)
    assert tried.of(FINE).fault is None


def test_memory_is_limited(monkeypatch):
    monkeypatch.setattr(trials, "MEMORY", 2**24)
    many = "start: A\nA: " + " | ".join(f'"{i} and more"' for i in range(40_000))
    verdict = Trials(vocabulary).of(many)
    assert verdict.died
    assert "memory" in verdict.fault


def test_a_process_is_used_again_and_one_that_was_killed_is_replaced(tried):
    assert tried.of(FINE).fault is None
    (process,) = tried._idle[-1:]
    assert tried.of(FINE).fault is None
    assert tried._idle[-1] is process
    os.kill(process._process.pid, signal.SIGKILL)
    process._process.wait()
    assert tried.of(FINE).fault is None
    assert process not in tried._idle


def test_a_process_that_cannot_start_is_no_fault_of_the_grammar(monkeypatch):
    monkeypatch.setattr(trials, "_START", "raise SystemExit(7) # {} {} {}")
    with pytest.raises(EngineError, match="code 7"):
        Trials(vocabulary).of(FINE)


def test_too_many_at_once_are_sent_away(monkeypatch):
    monkeypatch.setattr(trials, "_PATIENCE", 0.01)
    full = Trials(vocabulary)
    for _ in range(trials.PROCESSES):
        assert full._free.acquire(timeout=1)
    with pytest.raises(EngineError, match="Try again later"):
        full.of(FINE)


def test_the_processes_end_with_their_users():
    users = Trials(vocabulary)
    users.of(FINE)
    (process,) = users._idle
    del users
    assert process._process.returncode == 0


def test_a_parent_that_is_killed_leaves_no_orphan():
    code = (
        "from tests.guided.test_trials import *\nfound = Trials(vocabulary)\nfound.of(FINE)\n"
        "print(found._idle[0]._process.pid, flush=True)\nthreading.Event().wait()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=ROOT) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    assert not psutil.wait_procs([child], timeout=60)[1]


def test_a_grammar_is_tried_once_and_then_known(monkeypatch):
    texts: list[str] = []
    of = Trials.of
    monkeypatch.setattr(Trials, "of", lambda self, text: (texts.append(text), of(self, text))[1])
    grammars = Grammars(TOKENIZER, 2570)
    form = {"type": "regex", "regex": "once [0-9]"}
    threads = [threading.Thread(target=grammars.compile, args=(form,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    grammars.compile(form)
    assert len(texts) == 1


def test_the_least_recently_used_is_forgotten_by_bytes():
    kept: LruCache[bytearray] = LruCache(100, len)
    values = {key: bytearray(40) for key in "abc"}
    for key in "ab":
        kept.put(key, values[key])
    assert kept.get("a") is values["a"]
    kept.put("c", values["c"])
    assert [kept.get(key) is not None for key in "abc"] == [True, False, True]
    values["c"].extend(bytes(50))  # grown while it was kept
    kept.put("a", values["a"])
    assert [kept.get(key) is not None for key in "abc"] == [True, False, False]
    kept.put("d", bytearray(101))
    assert len(kept) == 0


def test_large_grammars_are_not_kept_for_ever(monkeypatch):
    monkeypatch.setattr("lmdeploy_jax.guided.grammars.GRAMMAR_CACHE_BYTES", 2**20)
    grammars = Grammars(TOKENIZER, 2570)
    made = [grammars.compile({"type": "choice", "choice": [text]}) for text in "abcdefgh"]
    assert not grammars.has(made[0].source.text)
    assert grammars._grammars.get(made[-1].source.text) is made[-1]
    assert sum(grammar.size for grammar in grammars._grammars._values.values()) <= 2**20
    before = made[-1].size
    made[-1].matcher([]).advance(TOKENIZER.token_to_id("h"))
    made[-1].matcher([]).advance(TOKENIZER.token_to_id("h"))
    assert made[-1].size > before
