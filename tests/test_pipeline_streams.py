"""Streams and conversations over a scripted engine: pieces, sessions, aborts."""

from __future__ import annotations

import gc
import signal
import threading
from collections.abc import Iterator

import pytest

from lmdeploy_jax import GenerationConfig, Response
from lmdeploy_jax.engine.request import Request
from lmdeploy_jax.errors import RequestConflictError, RequestError
from tests.patience import wait_until
from tests.scripted import RAW, TOKENIZER, Opener, echo, endless, ids, opener


@pytest.fixture
def opened() -> Iterator[Opener]:
    with opener() as opened:
        yield opened


def test_a_streams_pieces_join_to_the_answers(opened):
    pipe, _ = opened(echo)
    texts = ["hello you", "one", "what is this?"]
    expected = pipe.infer(texts, **RAW)
    pieces: dict[int, list[Response]] = {0: [], 1: [], 2: []}
    for piece in pipe.stream_infer(texts, **RAW):
        pieces[piece.index].append(piece)
    for i, parts in pieces.items():
        assert len(parts) > 1
        assert "".join(p.text for p in parts) == expected[i].text
        assert [t for p in parts for t in p.token_ids] == expected[i].token_ids
        assert [p.finish_reason for p in parts[:-1]] == [None] * (len(parts) - 1)
        assert (parts[-1].finish_reason, parts[-1].generate_token_len) == (
            "stop",
            expected[i].generate_token_len,
        )


def test_a_config_may_be_changed_while_its_answers_are_under_way(opened):
    pipe, _ = opened(endless)
    config = GenerationConfig(logprobs=1)
    with pipe.stream_infer("a", gen_config=config, **RAW) as stream:
        config.logprobs = None
        assert [next(stream).logprobs is None for _ in range(9)] == [False] * 9


def test_stream_response_false_gives_one_piece_a_prompt(opened):
    pipe, _ = opened(echo)
    pieces = list(pipe.stream_infer(["a", "b"], stream_response=False, **RAW))
    assert sorted((p.index, p.text) for p in pieces) == [(0, "a #0"), (1, "b #0")]


def test_a_stream_works_from_the_call_on_and_fails_prompts_as_pieces(opened):
    pipe, engine = opened(echo)
    stream = pipe.stream_infer(["a", [99999]], **RAW)
    wait_until(lambda: len(engine.seen) == 1 and engine.idle)
    last = [p for p in stream if p.finish_reason]
    assert sorted((p.index, p.finish_reason) for p in last) == [(0, "stop"), (1, "error")]


@pytest.mark.parametrize("leave", ["close", "delete", "raise"])
def test_a_stream_that_is_left_aborts(opened, leave):
    pipe, engine = opened(endless)
    stream = pipe.stream_infer(["a", "b"], gen_config=GenerationConfig(max_new_tokens=None))
    next(stream)
    if leave == "close":
        stream.close()
        assert list(stream) == []
    elif leave == "raise":
        with pytest.raises(KeyError), stream:
            raise KeyError
    del stream
    gc.collect()
    wait_until(lambda: engine.idle)
    assert sorted(engine.aborted) == [(r.request_id, None) for r in engine.seen]


def test_interrupting_infer_aborts_what_was_submitted(opened, monkeypatch):
    pipe, engine = opened(endless)
    engine.gate.clear()
    real = engine.submit

    def submit(request: Request) -> None:
        if len(engine.seen) == 2:
            raise KeyboardInterrupt
        real(request)

    monkeypatch.setattr(engine, "submit", submit)
    with pytest.raises(KeyboardInterrupt):
        pipe.infer(["a", "b", "c"])
    wait_until(lambda: engine.idle)
    assert sorted(engine.aborted) == [(r.request_id, None) for r in engine.seen[:2]]


def test_ctrl_c_reaches_an_infer_that_waits(opened):
    pipe, engine = opened(endless)
    main = threading.get_ident()
    threading.Timer(0.1, lambda: signal.pthread_kill(main, signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        pipe.infer(["a", "b"], GenerationConfig(max_new_tokens=None))
    wait_until(lambda: engine.idle)
    assert sorted(engine.aborted) == [(r.request_id, None) for r in engine.seen]


def test_sessions_abort_their_own_prompt(opened):
    pipe, engine = opened(endless)
    engine.gate.clear()
    sessions = [pipe.session(), pipe.session()]
    config = GenerationConfig(max_new_tokens=20)
    stream = pipe.stream_infer(["a", "b"], sessions, config)
    assert sessions[0].active
    with pytest.raises(RequestConflictError, match="already has an active request"):
        pipe.stream_infer("c", sessions[0])
    sessions[1].abort()
    engine.gate.set()
    last = {p.index: p.finish_reason for p in stream if p.finish_reason}
    assert last == {0: "length", 1: "abort"}
    assert not sessions[0].active
    with pytest.raises(ValueError, match=r"Got 1 prompts and 2 sessions"):
        pipe.stream_infer(["a"], sessions)


def test_chat_keeps_the_conversation_and_sends_it_again(opened):
    answers = iter(["Hello Ann", "Ann it is"])
    pipe, engine = opened(lambda request, index: ids(next(answers)))
    session = pipe.chat([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "I am Ann"}])
    same = pipe.chat("Who am I?", session)
    assert same is session
    assert [answer for _, answer in session.history] == ["Hello Ann", "Ann it is"]
    assert (session.prompt, session.response.text) == ("Who am I?", "Ann it is")
    expected = pipe.frontend.template.render(
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "I am Ann"},
            {"role": "assistant", "content": "Hello Ann"},
            {"role": "user", "content": "Who am I?"},
        ]
    )
    assert TOKENIZER.decode(engine.seen[1].prompt.ids, skip_special_tokens=False) == expected
    session.reset()
    assert (session.history, session.response) == ([], None)


def test_a_streamed_turn_enters_the_history_when_it_ends(opened):
    pipe, _ = opened(lambda request, index: ids("one two three"))
    session = pipe.session()
    pieces = list(pipe.chat("hi", session, stream_response=True))
    assert "".join(p.text for p in pieces) == "one two three"
    assert len(pieces) > 1
    assert session.history == [("hi", "one two three")]
    assert pieces[0].text != session.response.text == "one two three"


@pytest.mark.parametrize("how", ["close", "abort", "never read"])
def test_a_turn_that_is_left_is_dropped(opened, how):
    pipe, engine = opened(endless)
    session = pipe.session()
    turn = pipe.chat("hi", session, GenerationConfig(max_new_tokens=None), stream_response=True)
    if how == "never read":
        assert session.active
        del turn
        gc.collect()
    else:
        next(turn)
        if how == "close":
            turn.close()
        else:
            session.abort()
            assert list(turn)[-1].finish_reason == "abort"
    wait_until(lambda: engine.idle)
    assert (session.history, session.active) == ([], False)
    engine.script = lambda request, index: ids("fine")
    assert pipe.chat("again", session).history == [("again", "fine")]


def test_one_answer_at_a_time_in_a_session(opened):
    pipe, engine = opened(endless)
    session = pipe.session(GenerationConfig(max_new_tokens=3))
    engine.gate.clear()
    turn = pipe.chat("hi", session, stream_response=True)
    with pytest.raises(RequestConflictError, match=f"Session {session.session_id} already has"):
        pipe.chat("and", session)
    engine.gate.set()
    assert list(turn)[-1].finish_reason == "length"
    assert [p for p, _ in session.history] == ["hi"]
    assert session.response.generate_token_len == 3
    with pytest.raises(RequestError, match="n=2"):
        pipe.chat("x", session, GenerationConfig(n=2))


def test_a_failed_turn_is_told_and_dropped(opened):
    pipe, _ = opened(echo, session_len=40)
    session = pipe.chat("one two " * 60)
    assert (session.response.finish_reason, session.history) == ("error", [])


def test_arguments_of_the_wrong_type_are_named(opened):
    pipe, _ = opened(echo)
    config = GenerationConfig(max_new_tokens=1)
    with pytest.raises(TypeError, match=r"sessions must be of type Session.*GenerationConfig"):
        pipe.stream_infer(["a"], config)
    with pytest.raises(TypeError, match="gen_config must be of type GenerationConfig"):
        pipe.infer(["a"], gen_config=[{"max_new_tokens": 1}])
    with pytest.raises(TypeError, match=r"gen_config must be of type GenerationConfig.* it has 5"):
        pipe.infer(["a"], gen_config=5)
