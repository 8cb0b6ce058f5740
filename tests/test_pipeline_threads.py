"""The pipeline among threads and event loops; logs; what an import costs."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from lmdeploy_jax import GenerationConfig, Pipeline, Response
from lmdeploy_jax.assets import TINY_CHAT
from lmdeploy_jax.engine.io.frontend import Frontend
from lmdeploy_jax.text.chat_template import select
from tests.fake_engine import FakeEngine
from tests.patience import PATIENCE, wait_until
from tests.scripted import RAW, TOKENIZER, Opener, echo, endless, opener


@pytest.fixture
def opened() -> Iterator[Opener]:
    with opener() as opened:
        yield opened


def test_several_threads_share_a_pipeline(opened):
    pipe, _ = opened(echo)
    results: dict[int, list[str]] = {}

    def work(i: int) -> None:
        results[i] = [a.text for a in pipe.infer([f"thread {i} text {j}" for j in range(5)], **RAW)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert results == {i: [f"thread {i} text {j} #0" for j in range(5)] for i in range(6)}


def test_closing_ends_what_others_wait_for(opened):
    pipe, engine = opened(endless)
    engine.gate.clear()
    stream = pipe.stream_infer("a", gen_config=GenerationConfig(max_new_tokens=None))
    pipe.close()
    assert [p.finish_reason for p in stream] == ["abort"]


def test_everything_works_inside_a_running_event_loop(opened):
    pipe, _ = opened(echo)

    async def notebook() -> tuple[str, str]:
        return pipe.infer("cell", **RAW).text, pipe.chat("cell").response.finish_reason

    assert asyncio.run(notebook()) == ("cell #0", "stop")


def test_async_streams_run_side_by_side(opened):
    pipe, _ = opened(echo)

    async def read(text: str) -> str:
        return "".join([p.text async for p in pipe.async_stream(text, **RAW)])

    async def both() -> list[str]:
        return await asyncio.gather(*(read(f"text {i}") for i in range(8)))

    assert asyncio.run(both()) == [f"text {i} #0" for i in range(8)]


def test_async_streams_fail_as_pieces(opened):
    pipe, _ = opened(echo)

    async def read() -> list[Response]:
        return [p async for p in pipe.async_stream([99999])]

    (piece,) = asyncio.run(read())
    assert (piece.finish_reason, piece.error_code) == ("error", "invalid_request")


@pytest.mark.parametrize("how", ["cancel", "close"])
def test_leaving_an_async_stream_aborts(opened, how):
    pipe, engine = opened(endless)

    async def cancel() -> None:
        started = asyncio.Event()

        async def read() -> None:
            async for _ in pipe.async_stream("a", GenerationConfig(max_new_tokens=None)):
                started.set()

        task = asyncio.create_task(read())
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    async def close() -> None:
        stream = pipe.async_stream("a", GenerationConfig(max_new_tokens=None))
        await anext(stream)
        await stream.aclose()

    asyncio.run(cancel() if how == "cancel" else close())
    wait_until(lambda: engine.idle)
    assert engine.aborted == [(engine.seen[0].request_id, None)]


def test_an_async_stream_submits_beside_the_event_loop(opened, monkeypatch):
    """To try a form's grammar takes a while, in which others go on, and who asked may leave."""
    pipe, engine = opened(endless)
    submit, entered, left = pipe.frontend.submit, threading.Event(), threading.Event()

    def slow(*args, **kwargs) -> int:
        assert threading.current_thread() is not threading.main_thread()  # the event loop's
        entered.set()
        assert left.wait(PATIENCE)
        return submit(*args, **kwargs)

    monkeypatch.setattr(pipe.frontend, "submit", slow)

    async def read() -> None:
        await anext(pipe.async_stream("a", GenerationConfig(max_new_tokens=None)))

    async def leave() -> None:
        task = asyncio.create_task(read())
        while not entered.is_set() and not task.done():
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        left.set()

    asyncio.run(leave())
    wait_until(lambda: engine.idle)
    assert {*engine.aborted} == {(engine.seen[0].request_id, None)}


def test_a_progress_bar_changes_nothing(opened, capsys):
    pipe, _ = opened(echo)
    assert [a.text for a in pipe.infer(["a", "b"], use_tqdm=True, **RAW)] == ["a #0", "b #0"]


def test_prompts_are_logged_shortened(caplog):
    engine = FakeEngine(TINY_CHAT, echo)
    pipe = Pipeline.from_frontend(Frontend(engine, TOKENIZER, select(TOKENIZER, TINY_CHAT), max_log_len=4))
    with pipe, caplog.at_level("REQUEST", "lmdeploy_jax"):
        pipe.infer("abcdefgh", **RAW)
    (record,) = [r for r in caplog.records if r.levelno == 15]
    assert "'abcd... (4 more)'" in record.getMessage()
    with caplog.at_level(logging.INFO, "lmdeploy_jax"):
        assert not [r for r in caplog.records if r.levelno > 15]


def test_importing_the_package_imports_nothing_heavy():
    code = (
        "import sys, lmdeploy_jax\n"
        "heavy = {'jax', 'numpy', 'flax', 'tokenizers', 'jinja2', 'rich'} & set(sys.modules)\n"
        "import lmdeploy_jax.pipeline\n"
        "from lmdeploy_jax import pipeline, ChatTemplateConfig, Tokenizer\n"
        "print(sorted(heavy), callable(pipeline), ChatTemplateConfig.__name__, Tokenizer.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] True ChatTemplateConfig Tokenizer"
