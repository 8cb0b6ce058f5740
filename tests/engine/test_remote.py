"""The engine in a process of its own answers as one in this process does, and neither outlives the other."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial

import numpy as np
import psutil
import pytest

from lmdeploy_jax.assets import TINY_CHAT
from lmdeploy_jax.engine.core.engine import Engine
from lmdeploy_jax.engine.process.remote import RemoteEngine
from lmdeploy_jax.errors import (
    CheckpointError,
    ConfigError,
    ContextLengthError,
    EngineError,
    LmdeployError,
    RequestError,
)
from lmdeploy_jax.guided.grammars import Grammars
from lmdeploy_jax.guided.reasoning import after_reasoning
from lmdeploy_jax.guided.tools import tool_grammar
from lmdeploy_jax.text.parsers import reasoning_format, tool_format
from lmdeploy_jax.text.tokenizer import Tokenizer
from tests.engine.harness import Collector, config, generate, submit
from tests.fake_engine import FakeEngine
from tests.patience import PATIENCE, wait_until

TOKENIZER = Tokenizer(TINY_CHAT)
PROMPTS = [TOKENIZER.encode(text) for text in ("What is 12 + 30?", "Spell the word cat.", "one two three")]


@pytest.fixture(scope="module")
def local(compile_cache):
    engine = Engine(TINY_CHAT, config(compile_cache), progress=False)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def remote(compile_cache):
    engine = RemoteEngine(TINY_CHAT, config(compile_cache), progress=False)
    yield engine
    engine.close()
    assert engine._process.exitcode == 0


def counting(request, index):
    """Endless tokens that tell where they stand."""
    return (i % 1000 for i in range(10**9))


def fake(script, model, config, progress):
    return FakeEngine(TINY_CHAT, script)


@pytest.fixture
def scripted():
    """An engine without a model in a process of its own; ends without help."""
    engine = RemoteEngine(TINY_CHAT, progress=False, build=partial(fake, counting))
    yield engine
    engine.close()
    assert not psutil.pid_exists(engine._process.pid)


def told(results):
    """Everything that an engine says of a request, however it was divided."""
    return [
        (
            result.tokens,
            result.reason,
            result.last.stop_token,
            [(entry.logprob, entry.top) for out in result.outputs for entry in out.logprobs],
            [out.prompt_logprobs for out in result.outputs if out.prompt_logprobs is not None],
        )
        for result in results
    ]


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"stop_token_ids": frozenset(range(0, 2560, 3))},
        {"temperature": 1.0, "top_k": 50, "seed": 7, "n": 2},
        {"logprobs": 3, "prompt_logprobs": 2, "repetition_penalty": 1.2},
    ],
    ids=["greedy", "stopped", "sampled", "logprobs"],
)
def test_answers_equal_those_of_an_engine_in_this_process(local, remote, params):
    for prompt in PROMPTS:  # one by one: in other batches the last bits may differ
        here, there = (generate(engine, [prompt], **params)[0] for engine in (local, remote))
        assert told(here) == told(there)
        assert there[0].outputs[0].queue_seconds > 0


def test_logits_and_hidden_states_cross(local, remote):
    outs = [
        generate(e, PROMPTS[:1], logits="all", hidden="all", max_new_tokens=4)[0][0] for e in (local, remote)
    ]
    for name in ("logits", "hidden"):
        here, there = (np.concatenate([getattr(out, name) for out in r.outputs]) for r in outs)
        np.testing.assert_array_equal(here, there)
        assert len(here) >= len(PROMPTS[0])


def test_a_grammar_is_compiled_again_on_the_other_side(remote):
    form = {"type": "regex", "regex": "[a-d]{3}-[0-9]{2}"}
    grammars = Grammars(TOKENIZER, remote.vocab_size)
    not_here = grammars.compile(form, here=False)
    for grammar in (grammars.compile(form), not_here):
        (result,) = generate(remote, PROMPTS[:1], grammar=grammar)[0]
        text = TOKENIZER.decode(result.tokens)
        assert len(text) == 6, text
        assert text[3] == "-", text
        assert result.reason == "stop"


CHOICE = {"type": "choice", "choice": ["yes", "no"]}
TOOL = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}


@pytest.mark.parametrize(
    "form",
    [
        after_reasoning(CHOICE, reasoning_format("default"), TOKENIZER, forbidden=True),
        tool_grammar(tool_format("qwen"), [TOOL], TOKENIZER),
    ],
    ids=["after reasoning", "tool call"],
)
def test_grammars_that_are_written_from_parts_cross_too(remote, form):
    grammar = Grammars(TOKENIZER, remote.vocab_size).compile(form, here=False)
    (result,) = generate(remote, PROMPTS[:1], grammar=grammar)[0]
    assert result.last.error is None
    assert TOKENIZER.decode(result.tokens).strip() in ("yes", "no") or "now" in TOKENIZER.decode(
        result.tokens
    )


class Unreadable:
    """Can be sent and cannot be received."""

    def __reduce__(self):
        return int, ("no number",)


def test_what_cannot_be_received_costs_its_own_request_only(remote):
    bad = Collector(2)
    submit(remote, PROMPTS[0], bad, n=2, logits=Unreadable())
    assert [type(result.last.error) for result in bad.wait()] == [ValueError, ValueError]
    assert generate(remote, PROMPTS[:1])[0][0].reason in ("stop", "length")


def test_what_cannot_be_served_is_refused_by_submit(local, remote):
    for bad, params in (
        ([], {}),
        ([5] * 512, {}),
        ([5, 2560], {}),
        ([5], {"n": 9}),
        ([5], {"ngram_size": 2000}),
    ):
        errors = []
        for engine in (local, remote):
            with pytest.raises(RequestError) as caught:
                submit(engine, bad, lambda out: None, **params)
            errors.append((caught.type, str(caught.value)))
        assert errors[0] == errors[1]
    assert errors[0][0] is not ContextLengthError


def test_what_cannot_leave_the_process_is_refused(remote):
    with pytest.raises(RequestError, match="cannot be sent"):
        submit(remote, [5], Collector(), logits_processors=(lambda ids, logits: logits,))


def test_an_abort_crosses(remote):
    collector = Collector(2)
    request = submit(remote, PROMPTS[0], collector, n=2, max_new_tokens=450, temperature=1.0)
    wait_until(lambda: all(result.outputs for result in collector.results))
    remote.abort(request.request_id, 0)
    first, second = collector.wait()
    assert (first.reason, second.reason) == ("abort", "length")
    remote.abort(request.request_id)  # has ended: left alone


def test_stats_and_steps_are_told(local, remote):
    steps = {local: [], remote: []}
    for engine, told in steps.items():
        engine.on_step = told.append
        collector = Collector()
        submit(engine, range(40, 140), collector, max_new_tokens=300)
        wait_until(lambda e=engine: e.stats.running == 1 and e.stats.pages_used > 0)
        collector.wait()
        wait_until(lambda e=engine: e.stats.running == e.stats.pages_used == 0)
    wait_until(lambda: steps[local] == steps[remote])
    assert remote.stats.compilations > 0
    for engine in steps:
        engine.on_step = None


def test_sleep_and_wake(remote):
    before = generate(remote, PROMPTS[:1])[0][0].tokens
    collector = Collector()
    submit(remote, PROMPTS[0], collector, max_new_tokens=450)
    remote.sleep()
    assert remote.sleeping
    assert collector.wait()[0].reason == "abort"
    with pytest.raises(EngineError, match="sleeping"):
        submit(remote, [5], Collector())
    remote.wake(["weights"])
    assert remote.sleeping
    remote.wake()
    assert not remote.sleeping
    assert generate(remote, PROMPTS[:1])[0][0].tokens == before
    with pytest.raises(RequestError, match="level=3"):
        remote.sleep(3)


def test_closing_ends_what_runs(scripted):
    collector = Collector()
    submit(scripted, [5], collector, max_new_tokens=10**6)
    wait_until(lambda: collector.results[0].outputs)
    scripted.close()
    scripted.close()
    (result,) = collector.wait()
    assert result.reason == "abort"
    assert result.tokens == [i % 1000 for i in range(len(result.tokens))]
    assert (scripted.failure, scripted._process.exitcode) == ("it has been closed", 0)
    with pytest.raises(EngineError, match="has been closed"):
        submit(scripted, [5], Collector())


def test_a_process_that_is_killed_fails_what_runs(scripted):
    collector = Collector(2)
    submit(scripted, [5], collector, n=2, max_new_tokens=10**6)
    wait_until(lambda: collector.results[1].outputs and scripted.stats.running)
    os.kill(scripted._process.pid, signal.SIGKILL)
    for result in collector.wait():
        assert result.reason == "error"
        assert isinstance(result.last.error, EngineError)
        assert "signal 9" in str(result.last.error)
    assert scripted.failure == "the engine's process ended with signal 9"
    assert scripted.stats.running == 0  # other copies go on, and metrics are those of all together
    with pytest.raises(EngineError, match="signal 9"):
        submit(scripted, [5], Collector())
    with pytest.raises(EngineError, match="signal 9"):
        scripted.sleep()


def test_a_process_that_hangs_is_killed_at_the_end(scripted, monkeypatch):
    monkeypatch.setattr("lmdeploy_jax.engine.process.remote._EXIT_TIMEOUT", 0.5)
    collector = Collector()
    submit(scripted, [5], collector, max_new_tokens=10**6)
    os.kill(scripted._process.pid, signal.SIGSTOP)
    for _ in range(2000):  # more than the connection holds
        submit(scripted, [5] * 100, lambda out: None)
    scripted.close()
    assert collector.wait()[0].reason == "abort"


def test_signals_to_the_group_do_not_end_it(scripted):
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(scripted._process.pid, number)
    collector = Collector()
    submit(scripted, [5], collector, max_new_tokens=20)
    assert collector.wait()[0].reason == "length"


def failing(error, model, config, progress):
    raise error


def ending(code, model, config, progress):
    os._exit(code)


@pytest.mark.parametrize(
    ("build", "kind", "text"),
    [
        (partial(failing, ConfigError("tp=9")), ConfigError, "tp=9"),
        (partial(failing, FileNotFoundError(2, "No such file", "x")), FileNotFoundError, "'x'"),
        (partial(failing, ZeroDivisionError("0")), ZeroDivisionError, "0"),
        (partial(failing, subprocess.TimeoutExpired("cmd", 3)), LmdeployError, "TimeoutExpired: .*3 seconds"),
        (partial(ending, 3), EngineError, "could not start: the engine's process ended with exit code 3"),
    ],
)
def test_errors_of_the_start_are_raised_here(build, kind, text):
    before = set(multiprocessing.active_children())
    with pytest.raises(kind, match=text) as caught:
        RemoteEngine("any", progress=False, build=build)
    assert caught.type is kind
    assert set(multiprocessing.active_children()) <= before


def test_a_checkpoint_that_is_none(tmp_path):
    with pytest.raises(CheckpointError, match="config"):
        RemoteEngine(tmp_path, progress=False)


def test_an_engine_that_fails_says_so(compile_cache):
    engine = RemoteEngine(TINY_CHAT, config(compile_cache), progress=False, build=broken)
    collector = Collector()
    submit(engine, [5], collector)
    assert "ZeroDivisionError" in str(collector.wait()[0].last.error)
    assert "ZeroDivisionError" in engine.failure
    assert engine.stats.running == 0
    with pytest.raises(EngineError, match="ZeroDivisionError"):
        submit(engine, [5], Collector())
    engine.close()


def broken(model, config, progress):
    engine = Engine(model, config, progress=progress)
    engine._runner.forward = lambda step: 1 / 0
    return engine


ORPHAN = """
import sys, time
from functools import partial
from lmdeploy_jax.engine.process.remote import RemoteEngine
from lmdeploy_jax.prompt import EncodedPrompt
from tests.engine.test_remote import counting, fake, stuck
if __name__ == "__main__":
    print("begun", flush=True)
    engine = RemoteEngine("any", build=stuck if sys.argv[1] == "starting" else partial(fake, counting))
    print(engine._process.pid, flush=True)
    time.sleep(100)
"""


def stuck(model, config, progress):
    time.sleep(100)


@pytest.mark.parametrize("when", ["starting", "serving"])
def test_a_parent_that_is_killed_leaves_no_orphan(tmp_path, when):
    script = tmp_path / "parent.py"
    script.write_text(ORPHAN)
    with subprocess.Popen(
        [sys.executable, str(script), when],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.getcwd()},
    ) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"begun\n"
        if when == "serving":
            parent.stdout.readline()
        wait_until(lambda: len(psutil.Process(parent.pid).children()) == 2)  # Python's resource tracker too
        children = psutil.Process(parent.pid).children()
        parent.kill()
    assert not psutil.wait_procs(children, timeout=PATIENCE)[1]


def test_the_server_needs_no_jax_beside_the_engine():
    code = (
        "import sys; from lmdeploy_jax.engine.io import frontend; from lmdeploy_jax.cli import serve; "
        "from lmdeploy_jax.engine.process import remote; "
        "from lmdeploy_jax.server import run, service; from lmdeploy_jax.guided import grammars; "
        "print({'jax', 'jaxlib', 'flax', 'orbax'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_many_threads_may_submit(scripted):
    def work():
        for collector in [Collector() for _ in range(20)]:
            submit(scripted, [5], collector, max_new_tokens=5)
            assert collector.wait()[0].tokens == [0, 1, 2, 3, 4]

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive()
