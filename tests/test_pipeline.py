"""The pipeline over a scripted engine: forms, isolation, streams, sessions, aborts, threads, event loops."""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from lmdeploy_jax import GenerationConfig, Pipeline, Response, pipeline
from lmdeploy_jax.assets import TINY_CHAT
from lmdeploy_jax.engine.frontend import Frontend
from lmdeploy_jax.engine.request import Request
from lmdeploy_jax.errors import ConfigError, EngineError, RequestConflictError, RequestError
from lmdeploy_jax.text.chat_template import select
from lmdeploy_jax.text.tokenizer import Tokenizer
from tests.fake_engine import FakeEngine

TOKENIZER = Tokenizer(TINY_CHAT)
ENDLESS = TOKENIZER.encode(" and") * 1000


def ids(text: str, *, stop: bool = True) -> list[int]:
    return TOKENIZER.encode(text) + ([TOKENIZER.eos_token_id] if stop else [])


def echo(request: Request, index: int) -> list[int]:
    """Says the prompt again, and which of n answers it is."""
    return [*request.prompt, *ids(f" #{index}")]


class Opened:
    """Pipelines over scripted engines, closed after the test."""

    def __init__(self) -> None:
        self.pipes: list[Pipeline] = []

    def __call__(self, script: Callable, **sizes) -> tuple[Pipeline, FakeEngine]:
        engine = FakeEngine(TINY_CHAT, script, **sizes)
        pipe = Pipeline.over(Frontend(engine, TOKENIZER, select(TOKENIZER, TINY_CHAT)))
        self.pipes.append(pipe)
        return pipe, engine


@pytest.fixture
def opened() -> Iterator[Opened]:
    opened = Opened()
    yield opened
    for pipe in opened.pipes:
        pipe.close()


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)


RAW = {"do_preprocess": False}


# -- prompts and answers ----------------------------------------------------------------------------------


def test_one_prompt_gives_one_response_and_many_give_a_list_in_order(opened):
    pipe, _ = opened(echo)
    answer = pipe.infer("hello you", **RAW)
    assert isinstance(answer, Response)
    assert (answer.text, answer.finish_reason, answer.index) == ("hello you #0", "stop", 0)
    texts = [f"number {i}" for i in range(20)]
    answers = pipe.infer(texts, **RAW)
    assert [(a.text, a.index) for a in answers] == [(f"{t} #0", i) for i, t in enumerate(texts)]
    assert [a.text for a in pipe(["one"], **RAW)] == ["one #0"]
    assert pipe.infer([]) == []


def test_chat_forms_go_through_the_template(opened):
    pipe, engine = opened(lambda request, index: ids("ok"))
    message = {"role": "user", "content": "hi"}
    for prompts in ("hi", message, [message], ["hi"], [[message]]):
        pipe.infer(prompts)
    assert len({tuple(r.prompt) for r in engine.seen}) == 1
    assert TOKENIZER.decode(engine.seen[0].prompt, skip_special_tokens=False).count("<|im_start|>") >= 2
    pipe.infer([message], **RAW)
    assert list(engine.seen[-1].prompt) == TOKENIZER.encode("hi")


def test_template_keywords_reach_the_template(opened):
    pipe, engine = opened(lambda request, index: ids("ok"))
    tool = {"type": "function", "function": {"name": "weather", "description": "d", "parameters": {}}}
    pipe.infer("hi")
    pipe.infer("hi", tools=[tool])
    pipe.infer("hi", enable_thinking=True)
    pipe.infer("hi", chat_template_kwargs={"enable_thinking": True})
    seen = [TOKENIZER.decode(request.prompt, skip_special_tokens=False) for request in engine.seen]
    plain, tools, thinking, same = seen
    assert "weather" in tools
    assert thinking == same != plain


def test_token_ids_are_taken_as_they_are(opened):
    pipe, _ = opened(echo)
    prompt = TOKENIZER.encode("one two")
    assert pipe.infer(input_ids=prompt).text == "one two #0"
    assert [a.text for a in pipe.infer(input_ids=[prompt, prompt[:1]])] == [
        "one two #0",
        TOKENIZER.decode(prompt[:1]) + " #0",
    ]
    assert pipe.infer(prompt).text == "one two #0"
    with pytest.raises(ValueError, match="exactly one of messages or input_ids"):
        pipe.infer("text", input_ids=prompt)
    with pytest.raises(ValueError, match="exactly one of messages or input_ids"):
        pipe.infer()


def test_each_prompt_may_have_its_own_config(opened):
    pipe, _ = opened(lambda request, index: ENDLESS)
    configs = [GenerationConfig(max_new_tokens=n) for n in (1, 5, 3)]
    assert [a.generate_token_len for a in pipe.infer(["a", "b", "c"], configs)] == [1, 5, 3]
    with pytest.raises(ValueError, match="input gen_config length differs from the length of prompts"):
        pipe.infer(["a", "b"], configs)


def test_n_answers_come_as_choices(opened):
    pipe, _ = opened(echo)
    answer = pipe.infer("hello", GenerationConfig(n=3), **RAW)
    assert [answer.text, *(c.text for c in answer.choices)] == ["hello #0", "hello #1", "hello #2"]
    assert [c.choice for c in answer.choices] == [1, 2]
    texts = {}
    for piece in pipe.stream_infer("hello", gen_config=GenerationConfig(n=2), **RAW):
        texts[piece.choice] = texts.get(piece.choice, "") + piece.text
    assert texts == {0: "hello #0", 1: "hello #1"}


def test_stop_strings_end_an_answer_and_abort_it(opened):
    pipe, engine = opened(lambda request, index: ids("one two three", stop=False) + ENDLESS)
    answer = pipe.infer("x", GenerationConfig(stop_words=["two"], max_new_tokens=400))
    assert (answer.text, answer.finish_reason, answer.stop_match) == ("one ", "stop", "two")
    wait_until(lambda: engine.idle)
    assert engine.aborted == [(engine.seen[0].request_id, 0)]


def test_a_special_stop_word_stops_by_its_id_under_its_name(opened):
    pipe, _ = opened(lambda request, index: ids("one two"))
    config = GenerationConfig(stop_words=[TOKENIZER.eos_token], ignore_eos=True)
    answer = pipe.infer("x", config)
    assert (answer.text, answer.stop_match) == ("one two", TOKENIZER.eos_token)


# -- failures ---------------------------------------------------------------------------------------------


def test_a_bad_prompt_fails_alone(opened):
    pipe, _ = opened(echo, session_len=40)
    bad_message = [{"role": "wizard", "content": "hi"}]
    long = "one two " * 60
    answers = pipe.infer(["good", bad_message, long, [99999], "too", "broken \ud800"], **RAW)
    assert [a.finish_reason for a in answers] == ["stop", "error", "error", "error", "stop", "error"]
    assert [a.index for a in answers] == list(range(6))
    assert [a.error_code for a in answers[1:4]] == [
        "invalid_request",
        "context_length_exceeded",
        "invalid_request",
    ]
    assert "wizard" in answers[1].error_message
    assert "must be smaller than the model context length (40)" in answers[2].error_message
    assert "99999" in answers[3].error_message
    assert [answers[0].text, answers[4].text] == ["good #0", "too #0"]
    assert pipe.infer(bad_message).finish_reason == "error"


def test_an_engines_trouble_stays_with_its_prompt(opened):
    def script(request: Request, index: int) -> Iterator[int]:
        yield from ids("so far", stop=False)
        if len(request.prompt) == 1:
            raise RuntimeError("lost")
        yield TOKENIZER.eos_token_id

    pipe, _ = opened(script)
    bad, good = pipe.infer([[5], [5, 6]])
    assert (bad.text, bad.finish_reason, bad.error_code) == ("so far", "error", "internal_error")
    assert "lost" in bad.error_message
    assert good.finish_reason == "stop"


@pytest.mark.parametrize("prompts", [3, ("a", "b"), [["a"]], [None], object()])
def test_what_is_no_prompt_raises(opened, prompts):
    pipe, _ = opened(echo)
    with pytest.raises(ValueError, match="Unsupported prompts"):
        pipe.infer(prompts)


def test_unknown_and_unsupported_arguments_are_refused(opened):
    pipe, engine = opened(echo)
    with pytest.raises(TypeError, match=r"'max_new_tokens'.*GenerationConfig"):
        pipe.infer("hi", max_new_tokens=30)
    with pytest.raises(TypeError, match="'tool'"):
        pipe.stream_infer("hi", tool=[])
    with pytest.raises(RequestError, match="adapter_name='a'"):
        pipe.infer("hi", adapter_name="a")
    with pytest.raises(RequestError, match="do_preprocess=False"):
        pipe.infer("hi", enable_thinking=True, **RAW)
    assert not engine.seen


@pytest.mark.parametrize(
    ("fields", "error", "text"),
    [
        ({"trust_remote_code": True}, ConfigError, "trust_remote_code"),
        ({"speculative_config": object()}, ConfigError, "speculative_config"),
        ({"vision_config": object()}, ConfigError, "vision_config"),
        ({"allowed_media_domains": ["a"]}, ConfigError, "allowed_media_domains"),
        ({"backend_config": {"tp": 1}}, ConfigError, "backend_config"),
        ({"log_level": "LOUD"}, ConfigError, "log_level"),
        ({"tp": 2}, TypeError, r"'tp'.*JaxEngineConfig\(tp=2\)"),
        ({"sesion_len": 2}, TypeError, "'sesion_len'"),
    ],
)
def test_what_pipeline_cannot_do_is_refused_before_loading(fields, error, text):
    with pytest.raises(error, match=text):
        pipeline("no such model", **fields)


def test_a_closed_pipeline_says_so(opened):
    pipe, _ = opened(echo)
    with pipe:
        pass
    pipe.close()
    with pytest.raises(EngineError, match="closed"):
        pipe.infer("hi")


def test_there_are_no_reward_models(opened):
    pipe, _ = opened(echo)
    with pytest.raises(ValueError, match="Qwen3ForCausalLM is not in reward model list"):
        pipe.get_reward_score([1, 2])


def test_perplexity_is_the_mean_loss_of_all_tokens_but_the_first(opened):
    pipe, engine = opened(echo)
    assert pipe.get_ppl([[3, 4, 8], [1, 9]]) == [6.0, 9.0]  # the script's log-probability is minus the id
    assert pipe.get_ppl([3, 4]) == [4.0]
    assert pipe.get_ppl([]) == []
    assert {(r.params.max_new_tokens, r.params.prompt_logprobs) for r in engine.seen} == {(1, 0)}
    with pytest.raises(RequestError, match=r"input_ids\[1\] has 1 tokens"):
        pipe.get_ppl([[1, 2], [1]])
    assert all(map(math.isfinite, pipe.get_ppl([[1, 2]] * 3)))


# -- streams ----------------------------------------------------------------------------------------------


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
    pipe, engine = opened(lambda request, index: ENDLESS)
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
    pipe, engine = opened(lambda request, index: ENDLESS)
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
    pipe, engine = opened(lambda request, index: ENDLESS)
    main = threading.get_ident()
    threading.Timer(0.1, lambda: signal.pthread_kill(main, signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        pipe.infer(["a", "b"], GenerationConfig(max_new_tokens=None))
    wait_until(lambda: engine.idle)
    assert sorted(engine.aborted) == [(r.request_id, None) for r in engine.seen]


def test_sessions_abort_their_own_prompt(opened):
    pipe, engine = opened(lambda request, index: ENDLESS)
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


# -- conversations ----------------------------------------------------------------------------------------


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
    assert TOKENIZER.decode(engine.seen[1].prompt, skip_special_tokens=False) == expected
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
    pipe, engine = opened(lambda request, index: ENDLESS)
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
    pipe, engine = opened(lambda request, index: ENDLESS)
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


# -- threads, event loops, logs ---------------------------------------------------------------------------


def test_several_threads_share_a_pipeline(opened):
    pipe, _ = opened(echo)
    results: dict[int, list[str]] = {}

    def work(i: int) -> None:
        results[i] = [a.text for a in pipe.infer([f"thread {i} text {j}" for j in range(5)], **RAW)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert results == {i: [f"thread {i} text {j} #0" for j in range(5)] for i in range(6)}


def test_closing_ends_what_others_wait_for(opened):
    pipe, engine = opened(lambda request, index: ENDLESS)
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
    pipe, engine = opened(lambda request, index: ENDLESS)

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


def test_a_progress_bar_changes_nothing(opened, capsys):
    pipe, _ = opened(echo)
    assert [a.text for a in pipe.infer(["a", "b"], use_tqdm=True, **RAW)] == ["a #0", "b #0"]


def test_prompts_are_logged_shortened(caplog):
    engine = FakeEngine(TINY_CHAT, echo)
    pipe = Pipeline.over(Frontend(engine, TOKENIZER, select(TOKENIZER, TINY_CHAT), max_log_len=4))
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
