"""Tokens become text: stop strings, held-back characters, reports cut alike, whole equal to streamed."""

from __future__ import annotations

import queue
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from lmdeploy_jax.assets import TINY_CHAT
from lmdeploy_jax.engine.io.answer import OutputOptions
from lmdeploy_jax.engine.io.output import OutputProcessor
from lmdeploy_jax.engine.io.params import Stops
from lmdeploy_jax.engine.request import StepOutput, TokenLogprobs
from lmdeploy_jax.errors import EngineError
from lmdeploy_jax.messages import GenerationConfig, Response
from lmdeploy_jax.text.tokenizer import Tokenizer

TEXT = "The héllo wörld 🌍 ends, STOP here and goes on"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(TINY_CHAT)


class Bench:
    """A processor, fed by hand; `aborted` and `pieces` are what it did."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.aborted: list[tuple[int, int | None]] = []
        self.processor = OutputProcessor(tokenizer, lambda *key: self.aborted.append(key))
        self.pieces: queue.SimpleQueue[Response] = queue.SimpleQueue()

    def run(
        self,
        outs: Sequence[StepOutput],
        *,
        stream: bool = True,
        merge: bool = False,
        words: dict[int, str] | None = None,
        **fields,
    ) -> list[Response]:
        """What the reader gets. Outputs are taken one by one unless `merge`."""
        config = GenerationConfig(**fields)
        stops = Stops(frozenset(), tuple(config.stop_words or ()), words or {})
        options = OutputOptions(config, stops, stream, index=3)
        receive = self.processor.listener([1, 2], options, self.pieces.put)
        for out in outs:
            receive(out)
            while not merge and not self.processor._inbox.empty():
                time.sleep(0.0005)
        self.processor.close()
        return [self.pieces.get() for _ in range(self.pieces.qsize())]

    def steps(
        self, text: str, at_once: int = 1, stop: int | None = None, reason: str = "length"
    ) -> list[StepOutput]:
        """One output for `at_once` tokens, each with a log-probability and a row that name the token."""
        ids = self.tokenizer.encode(text) + ([] if stop is None else [stop])
        outs = [self._step(ids[i : i + at_once]) for i in range(0, len(ids), at_once)]
        outs[-1].finish_reason, outs[-1].stop_token = ("stop" if stop is not None else reason), stop
        return outs

    def _step(self, ids: list[int]) -> StepOutput:
        rows = np.array(ids, np.float32)[:, None]
        return StepOutput(
            5, 0, ids, [TokenLogprobs(-float(i), {0: -9.0}) for i in ids], logits=rows, hidden=-rows
        )


@pytest.fixture
def bench(tokenizer) -> Bench:
    return Bench(tokenizer)


def whole(pieces: Sequence[Response]) -> Response:
    first, *rest = pieces
    first = replace(first)
    for piece in rest:
        first.extend(piece)
    return first


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(("at_once", "merge"), [(1, False), (1, True), (3, False)])
def test_pieces_join_to_the_text(bench, stream, at_once, merge):
    outs = bench.steps(TEXT, at_once)
    ids = bench.tokenizer.encode(TEXT)
    pieces = bench.run(outs, stream=stream, merge=merge, logprobs=1)
    answer = whole(pieces)
    assert answer.text == TEXT
    assert answer.token_ids == ids
    assert (answer.index, answer.finish_reason, answer.input_token_len) == (3, "length", 2)
    assert answer.generate_token_len == len(ids)
    assert answer.logprobs == [{0: -9.0, token: -float(token)} for token in ids]
    np.testing.assert_array_equal(answer.logits[:, 0], ids)
    np.testing.assert_array_equal(answer.last_hidden_state, -answer.logits)
    assert stream or len(pieces) == 1
    assert not bench.aborted


def test_no_piece_holds_half_a_character(tokenizer):
    ids = tokenizer.encode("🌍")
    assert len(ids) > 1, "the vocabulary has learnt this character; choose another"
    bench = Bench(tokenizer)
    pieces = bench.run(
        [StepOutput(1, 0, [i]) for i in ids[:-1]] + [StepOutput(1, 0, ids[-1:], finish_reason="length")]
    )
    assert all("\ufffd" not in piece.text for piece in pieces)
    assert whole(pieces).text == "🌍"
    cut = Bench(tokenizer).run([StepOutput(1, 0, ids[:1], finish_reason="length")])
    assert cut[-1].text == "\ufffd"


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("at_once", [1, 100])
@pytest.mark.parametrize("include", [True, False])
def test_a_stop_string_cuts_text_and_aborts(bench, stream, at_once, include):
    outs = bench.steps(TEXT, at_once)
    outs[-1].finish_reason = None  # the engine would go on
    pieces = bench.run(
        outs,
        stream=stream,
        logprobs=1,
        stop_words=["nowhere", "s, STOP h"],
        include_stop_str_in_output=include,
    )
    answer = whole(pieces)
    assert answer.text == "The héllo wörld 🌍 end" + ("s, STOP h" if include else "")
    assert (answer.finish_reason, answer.stop_match) == ("stop", "s, STOP h")
    assert bench.aborted == [(5, 0)]
    kept = answer.token_ids
    assert kept == bench.tokenizer.encode(TEXT)[: len(kept)]
    assert "s, STOP h" in bench.tokenizer.decode(kept)
    assert "s, STOP h" not in bench.tokenizer.decode(kept[:-1])
    assert len(answer.logprobs) == len(answer.logits) == answer.generate_token_len == len(kept)
    assert sum(piece.finish_reason is not None for piece in pieces) == 1


def test_a_stop_string_in_the_last_output_needs_no_abort(bench):
    pieces = bench.run(bench.steps("one two", at_once=100), stop_words=["two"])
    assert (whole(pieces).text, pieces[-1].finish_reason, bench.aborted) == ("one ", "stop", [])


def test_the_beginning_of_a_stop_string_is_shown_if_it_comes_to_nothing(bench):
    pieces = bench.run(bench.steps("one STO"), stop_words=["STOP"])
    assert [p.text for p in pieces if "STO" in p.text] == [pieces[-1].text]
    assert whole(pieces).text == "one STO"


def test_stop_strings_wait_for_min_new_tokens(bench):
    text = "aa bb aa bb"
    first = len(bench.tokenizer.encode("aa bb aa"))
    pieces = bench.run(bench.steps(text), stop_words=["bb"], min_new_tokens=first)
    assert (whole(pieces).text, pieces[-1].stop_match) == ("aa bb aa ", "bb")


@pytest.mark.parametrize("stream", [True, False])
def test_the_stop_token_is_left_out(bench, stream):
    stop = bench.tokenizer.eos_token_id
    answer = whole(bench.run(bench.steps("hi you", stop=stop), stream=stream, logprobs=0))
    assert (answer.text, answer.finish_reason, answer.stop_match) == ("hi you", "stop", stop)
    ids = bench.tokenizer.encode("hi you")
    assert answer.token_ids == ids
    assert len(answer.logprobs) == len(answer.logits) == answer.generate_token_len == len(ids)


def test_the_stop_token_is_shown_when_asked_for_even_if_special(bench):
    stop = bench.tokenizer.eos_token_id
    outs = bench.steps("hi you", stop=stop)
    answer = whole(bench.run(outs, include_stop_str_in_output=True, logprobs=0, words={stop: "the end"}))
    assert answer.text == "hi you" + bench.tokenizer.eos_token
    assert answer.token_ids[-1] == stop
    assert len(answer.logprobs) == answer.generate_token_len == len(answer.token_ids)
    assert answer.stop_match == "the end"


def test_an_ordinary_stop_token_is_shown_once(bench):
    *head, stop = bench.tokenizer.encode("one two")
    outs = [StepOutput(1, 0, head), StepOutput(1, 0, [stop], finish_reason="stop", stop_token=stop)]
    assert whole(bench.run(outs, include_stop_str_in_output=True)).text == "one two"


def test_an_engines_error_keeps_what_was_said(bench):
    outs = bench.steps("hi you")
    outs[-1].finish_reason, outs[-1].error = "error", EngineError("broken")
    answer = whole(bench.run(outs))
    assert (answer.text, answer.finish_reason) == ("hi you", "error")
    assert (answer.error_code, answer.error_message) == ("engine_unavailable", "broken")


def test_prompt_logprobs_name_the_prompts_tokens(bench):
    outs = bench.steps("hi you")
    outs[0].prompt_logprobs = [None, TokenLogprobs(-1.5, {9: -0.5})]
    answer = whole(bench.run(outs, prompt_logprobs=1))
    assert answer.prompt_logprobs == [None, {9: -0.5, 2: -1.5}]
    assert answer.logprobs is None


class Panic(BaseException):
    """As a library written in Rust raises it: no Exception."""


def test_a_panic_costs_only_its_own_answer(tokenizer, monkeypatch):
    bench, pieces = Bench(tokenizer), []

    def panics(out: StepOutput) -> Response:
        raise Panic("decoder")

    options = OutputOptions(GenerationConfig(), Stops(frozenset(), (), {}))
    receive = bench.processor.listener([1], options, pieces.append)
    monkeypatch.setattr(receive.__self__._answers[0], "feed", panics)
    receive(StepOutput(77, 0, [1]))
    assert whole(bench.run(bench.steps("fine"))).text == "fine"
    assert [piece.error_message for piece in pieces] == ["Panic: decoder"]
    assert bench.aborted == [(77, 0)]


@pytest.mark.parametrize("fault", [ValueError, SystemExit])
def test_a_reader_that_fails_costs_only_its_own_request(tokenizer, fault):
    bench = Bench(tokenizer)

    def broken(piece: Response) -> None:
        raise fault("reader")

    options = OutputOptions(GenerationConfig(), Stops(frozenset(), (), {}))
    receive = bench.processor.listener([1], options, broken)
    receive(StepOutput(77, 0, [1]))
    receive(StepOutput(77, 0, [1]))
    assert whole(bench.run(bench.steps("fine"))).text == "fine"
    assert bench.aborted == [(77, 0)]
