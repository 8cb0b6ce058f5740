"""How long a pipeline lives: until its last handle goes, and in the process that opened it."""

from __future__ import annotations

import gc
import multiprocessing
import pickle
import threading
import warnings
import weakref
from collections.abc import Callable
from multiprocessing.connection import Connection
from types import SimpleNamespace

import jax
import pytest

from lmdeploy_jax import GenerationConfig, JaxEngineConfig, Pipeline, pipeline
from lmdeploy_jax.assets import TINY_CHAT
from lmdeploy_jax.engine.core import engine as engine_module
from lmdeploy_jax.engine.io.frontend import Frontend
from lmdeploy_jax.errors import EngineError
from lmdeploy_jax.text.chat_template import select
from tests.fake_engine import FakeEngine
from tests.patience import PATIENCE, wait_until
from tests.scripted import RAW, TOKENIZER, echo, endless, opener

CONFIG = GenerationConfig(max_new_tokens=4)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    cache = str(tmp_path_factory.mktemp("compiled"))
    return JaxEngineConfig(eager_mode=True, max_batch_size=2, session_len=128, compile_cache_dir=cache)


def engine_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("lmdeploy_jax")}


def test_what_nobody_holds_gives_back_its_threads_and_its_memory(small):
    pipe = pipeline("tiny-chat", small)  # what is cached once for all is there from now on
    pipe("What is 12 + 30?", CONFIG)
    pipe.close()
    gc.collect()
    threads, arrays = engine_threads(), len(jax.live_arrays())

    pipe = pipeline("tiny-chat", small)
    assert pipe("What is 12 + 30?", CONFIG).text == "42"
    held = weakref.ref(pipe.frontend.engine)
    pipe = pipeline("tiny-chat", small)  # as a notebook's cell does that is run again
    gc.collect()
    assert held() is None
    assert pipe("What is 12 + 30?", CONFIG).text == "42"
    del pipe
    gc.collect()
    assert engine_threads() <= threads
    assert len(jax.live_arrays()) <= arrays


def test_an_engine_beside_another_on_a_gpu_is_told_of(small, monkeypatch, caplog):
    class OnGpu:
        failure, facts = None, SimpleNamespace(on_cpu=False)

    other = OnGpu()
    monkeypatch.setattr(engine_module, "_opened", weakref.WeakSet([other]))
    with caplog.at_level("WARNING", "lmdeploy_jax"), pipeline("tiny-chat", small):
        assert "another engine is open" in caplog.text
    caplog.clear()
    other.failure = "it has been closed"
    with caplog.at_level("WARNING", "lmdeploy_jax"), pipeline("tiny-chat", small):
        assert "another engine" not in caplog.text


def test_a_stream_outlives_the_pipeline_that_began_it():
    engine = FakeEngine(TINY_CHAT, echo)
    pipe = Pipeline.from_frontend(Frontend(engine, TOKENIZER, select(TOKENIZER, TINY_CHAT)))
    stream = pipe.stream_infer("still here", **RAW)
    del pipe
    assert "".join(piece.text for piece in stream) == "still here #0"
    del stream
    wait_until(lambda: not engine._thread.is_alive())


def test_an_unread_stream_does_not_keep_the_engine():
    with opener() as opened:
        pipe, engine = opened(endless)
        stream = pipe.stream_infer("a", gen_config=GenerationConfig(max_new_tokens=None))
        next(stream)
        del stream
        wait_until(lambda: engine.idle)


def in_a_fork(work: Callable[[], object]) -> str:
    """What `work` raises in a forked child; fails where it hangs."""
    here, there = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=_tell, args=(there, work), daemon=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # JAX's own, of forks in general
        warnings.simplefilter("ignore", DeprecationWarning)
        child.start()
    try:
        assert here.poll(PATIENCE), "the child hangs"
        return here.recv()
    finally:
        child.kill()
        child.join()


def _tell(connection: Connection, work: Callable[[], object]) -> None:
    try:
        connection.send(f"returned {work()!r}")
    except BaseException as error:
        connection.send(f"{type(error).__name__}: {error}")


def test_a_forked_child_is_told_instead_of_hanging(small):
    with pipeline("tiny-chat", small) as pipe:
        told = in_a_fork(lambda: pipe("hi", CONFIG))
        assert told.startswith("EngineError: This engine was opened in process")
        assert "spawn" in told
        told = in_a_fork(lambda: pipeline("tiny-chat", small))
        assert told.startswith("EngineError: No engine can be opened here")
        assert "spawn" in told
        assert in_a_fork(pipe.close) == "returned None"  # and the parent's stays open
        assert pipe("What is 12 + 30?", CONFIG).text == "42"


def test_a_forked_child_can_drop_a_stream_of_its_parent(small):
    with pipeline("tiny-chat", small) as pipe:
        stream = pipe.stream_infer("Count to ten.")
        assert in_a_fork(stream.close) == "returned None"
        assert list(stream)[-1].finish_reason in ("stop", "length")


def test_what_cannot_travel_to_another_process_says_so(small):
    with opener() as opened:
        pipe, engine = opened(echo)
        with pytest.raises(TypeError, match=r"call pipeline\(\) there"):
            pickle.dumps(pipe)
        with pytest.raises(TypeError, match="open one there"):
            pickle.dumps(engine)
    with pytest.raises(EngineError, match="closed"):
        pipe.stream_infer("a")
