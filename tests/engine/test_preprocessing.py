"""Prompts with images are prepared by several threads, and no more of them than the memory has room for."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lmdeploy_jax import Pipeline, pipeline, preprocessing
from lmdeploy_jax.engine.io import images
from lmdeploy_jax.errors import RequestConflictError
from lmdeploy_jax.preprocessing import PreprocessingThreads
from lmdeploy_jax.stream import ResponseStream
from tests.engine.harness import config
from tests.engine.test_images import ASK, GREEDY, MORE, ONE, OTHER, save
from tests.patience import PATIENCE


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory, compile_cache: Path) -> Iterator[Pipeline]:
    folder = save("internvl_hf", tmp_path_factory.mktemp("prepared") / "internvl_hf")
    with pipeline(folder, config(compile_cache), progress=False) as opened:
        yield opened


@pytest.fixture
def opened_gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Until it is set, no image but `OTHER` can be loaded."""
    gate, load = threading.Event(), images.load_image

    def gated(source: Any, *rest: Any) -> Any:
        if source is not OTHER:
            assert gate.wait(PATIENCE)
        return load(source, *rest)

    monkeypatch.setattr(images, "load_image", gated)
    return gate


def test_an_image_that_comes_late_holds_no_other_prompt(pipe: Pipeline, opened_gate: threading.Event) -> None:
    pieces = pipe.stream_infer([(ASK, ONE), (MORE, OTHER)], gen_config=GREEDY, stream_response=False)
    answers = {}
    for piece in pieces:
        answers[piece.index] = piece.token_ids
        opened_gate.set()
    assert list(answers) == [1, 0]
    assert answers == {0: pipe((ASK, ONE), GREEDY).token_ids, 1: pipe((MORE, OTHER), GREEDY).token_ids}


@pytest.mark.skipif(preprocessing.THREADS < 2, reason="one core prepares one image at a time")
def test_images_are_decoded_side_by_side(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    both, load = threading.Barrier(2), images.load_image

    def met(*args: Any) -> Any:
        both.wait(PATIENCE)
        return load(*args)

    monkeypatch.setattr(images, "load_image", met)
    answers = pipe([(ASK, ONE), (MORE, OTHER), (ASK, "data:image/png;base64,AAAA"), (ASK, ONE)], GREEDY)
    assert [answer.finish_reason for answer in answers] == ["length", "length", "error", "length"]


def test_leaving_before_images_are_ready_ends_them(pipe: Pipeline, opened_gate: threading.Event) -> None:
    sessions = [pipe.session(), pipe.session()]
    pieces = pipe.stream_infer([(ASK, ONE), (MORE, ONE)], sessions=sessions, gen_config=GREEDY)
    with pytest.raises(RequestConflictError):
        pipe.stream_infer([(ASK, ONE), (MORE, ONE)], sessions=sessions, gen_config=GREEDY)
    sessions[0].abort()
    opened_gate.set()
    reasons = {piece.index: piece.finish_reason for piece in pieces}
    assert reasons == {0: "abort", 1: "length"}
    opened_gate.clear()
    pieces = pipe.stream_infer([(ASK, ONE), (MORE, ONE)], sessions=sessions, gen_config=GREEDY)
    pieces.close()
    opened_gate.set()
    assert list(pieces) == []
    assert pipe((MORE, OTHER), GREEDY).finish_reason == "length"


def test_patches_that_wait_have_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preprocessing, "MOST_BYTES", 10)
    monkeypatch.setattr(preprocessing, "THREADS", 3)
    delivered, arrived = [], threading.Semaphore(0)
    held, most = set(), []

    def encode(size: int) -> Any:
        return SimpleNamespace(images=[SimpleNamespace(patches=SimpleNamespace(nbytes=size))])

    def deliver(index: int, request: Any, encoded: Any) -> bool:
        held.add(index)
        most.append(sum(sizes[each] for each in held))
        delivered.append(index)
        arrived.release()
        return True

    sizes = [3, 4, 2, 11, 5, 6, 1, 9, 30]
    threads = PreprocessingThreads(list(enumerate(sizes)), encode, deliver)  # type: ignore[arg-type]
    for i in range(len(sizes)):
        assert arrived.acquire(timeout=PATIENCE)
        held.discard(delivered[i])
        threads.release(delivered[i])
    assert sorted(delivered) == list(range(len(sizes)))
    assert max(each for each in most if each not in (11, 30)) <= 10


def test_a_panic_becomes_its_own_prompts_answer() -> None:
    class Panic(BaseException):
        """As a library written in Rust raises it: no Exception."""

    def encode(_: Any) -> Any:
        raise Panic("broken")

    stream, delivered = ResponseStream(SimpleNamespace()), threading.Event()

    def deliver(*given: Any) -> bool:
        stream.take(*given)
        delivered.set()
        return True

    PreprocessingThreads([(0, SimpleNamespace())], encode, deliver)
    assert delivered.wait(PATIENCE)
    assert next(stream).error_message == "Panic: broken"
