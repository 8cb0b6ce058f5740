"""`chat` over the embedded model: it prints what the pipeline answers, and survives interruptions."""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lmdeploy_jax
from lmdeploy_jax.cli import chat
from lmdeploy_jax.cli.chat import Conversation, Talker
from lmdeploy_jax.cli.flags import FlagSet
from lmdeploy_jax.cli.main import main
from lmdeploy_jax.cli.remote_chat import RemoteConversation
from lmdeploy_jax.config import JaxEngineConfig
from lmdeploy_jax.errors import RequestError
from lmdeploy_jax.messages import GenerationConfig, Response
from lmdeploy_jax.pipeline import Pipeline
from tests.engine.test_images import ONE, save
from tests.server.live import LiveServer, serving

ROOT = Path(lmdeploy_jax.__file__).parent.parent
CONFIG = GenerationConfig(max_new_tokens=6)
SMALL = JaxEngineConfig(session_len=192, max_batch_size=2, max_prefill_token_num=64, eager_mode=True)


@pytest.fixture(scope="module")
def pipe() -> Iterator[Pipeline]:
    with Pipeline("tiny-chat", SMALL, progress=False) as opened:
        yield opened


@pytest.fixture
def conversation(pipe: Pipeline) -> Conversation:
    return Conversation(pipe, CONFIG, system=None, enable_thinking=None)


def answer_to(pipe: Pipeline, *messages: str, system: str | None = None) -> str:
    """The pipeline's answer to a conversation whose first messages it has answered the same way."""
    turns = [] if system is None else [{"role": "system", "content": system}]
    text = ""
    for message in messages:
        turns.append({"role": "user", "content": message})
        response = pipe.infer(turns, CONFIG)
        assert isinstance(response, Response)
        text = response.text
        turns.append({"role": "assistant", "content": text})
    return text


def talk(conversation: Talker, typed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    chat._talk(conversation)


def test_two_turns_and_a_fresh_start(
    pipe: Pipeline,
    conversation: Conversation,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    talk(conversation, "Say hi.\n\nWhat is\n2 + 3?\n\nend\n\nWhat is\n2 + 3?\n\nexit\n\n", monkeypatch)
    expected = [
        answer_to(pipe, "Say hi."),
        answer_to(pipe, "Say hi.", "What is\n2 + 3?"),
        answer_to(pipe, "What is\n2 + 3?"),
    ]
    assert capsys.readouterr().out == "".join(text + "\n" for text in expected)


def test_the_end_of_input_sends_what_was_typed(
    pipe: Pipeline,
    conversation: Conversation,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    talk(conversation, "Say hi.", monkeypatch)
    assert capsys.readouterr().out == answer_to(pipe, "Say hi.") + "\n"


def test_system_prompt(pipe: Pipeline, capsys: pytest.CaptureFixture[str]) -> None:
    conversation = Conversation(pipe, CONFIG, system="Answer in one word.", enable_thinking=None)
    conversation.answer("Say hi.")
    assert capsys.readouterr().out == answer_to(pipe, "Say hi.", system="Answer in one word.") + "\n"


def test_ctrl_c_drops_the_turn(
    pipe: Pipeline,
    conversation: Conversation,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(chat, "print", interrupted, raising=False)
        with pytest.raises(KeyboardInterrupt):
            conversation.answer("Say hi.")
    assert not conversation._session.active
    assert conversation._session.history == []
    capsys.readouterr()
    conversation.answer("What is 2 + 3?")
    assert capsys.readouterr().out == answer_to(pipe, "What is 2 + 3?") + "\n"


def test_a_turn_that_is_too_long_is_told(
    conversation: Conversation, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    talk(conversation, "word " * 500 + "\n\nexit\n", monkeypatch)
    told = capsys.readouterr().err
    assert "context length" in told
    assert told.count("\n") == 1
    assert conversation._session.history == []


def test_one_shot(pipe: Pipeline, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--max-batch-size=2", "--max-prefill-token-num=64", "--session-len=192", "--eager-mode"]
    assert main(["chat", "--prompt", "Say hi.", "--max-new-tokens", "6", *flags]) == 0
    assert capsys.readouterr().out == answer_to(pipe, "Say hi.") + "\n"


def test_one_shot_failure(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--max-batch-size=2", "--max-prefill-token-num=64", "--session-len=64", "--eager-mode"]
    assert main(["chat", "--prompt", "word " * 200, *flags]) == 1
    assert "context length" in capsys.readouterr().err


class Scribe:
    """Notes what it is asked."""

    def __init__(self) -> None:
        self.heard: list[str | None] = []

    def answer(self, text: str) -> None:
        self.heard.append(text)

    def show(self, source: str) -> None:
        if source == "missing":
            raise RequestError("no such file")
        self.heard.append(f"image {source}")

    def forget(self) -> None:
        self.heard.append(None)


@pytest.mark.parametrize("word", ["/bye", "/exit", "/quit", "exit"])
def test_words_that_quit(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scribe = Scribe()
    talk(scribe, f"one\n\n/new\n{word}\ntwo\n\n", monkeypatch)
    assert scribe.heard == ["one", None]


def test_images_are_shown_with_the_next_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scribe = Scribe()
    talk(scribe, "/image a b.png\n/image 'c.png'\n/image missing\n/image\none\n/image d\n\n", monkeypatch)
    assert scribe.heard == ["image a b.png", "image c.png", "one\n/image d"]
    told = capsys.readouterr().err.splitlines()
    assert told[:3] == [
        "[a b.png is shown with the next message]",
        "[c.png is shown with the next message]",
        "[no such file]",
    ]
    assert "/image FILE" in told[3]


def test_a_text_model_takes_no_images(conversation: Conversation) -> None:
    with pytest.raises(RequestError, match="takes no images"):
        conversation.show("a.png")
    assert main(["chat", "--image", "a.png", "--prompt", "hi", "--eager-mode"]) == 1


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    """A tiny random InternVL, whose words are w0, w1, ..."""
    folder = save("internvl_hf", tmp_path_factory.mktemp("seeing"))
    with Pipeline(folder, SMALL, progress=False) as opened:
        yield opened


@pytest.fixture(scope="module")
def live(seeing: Pipeline) -> Iterator[LiveServer]:
    """Begun before a test captures stderr: uvicorn has absl's log closed, which closes a stderr of before."""
    with serving(seeing.frontend) as server:
        yield server


def test_images_of_a_message(
    seeing: Pipeline, live: LiveServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both conversations send them before the text, once, and again with the history."""
    path = tmp_path / "one.png"
    ONE.save(path)
    gen_config = GenerationConfig(max_new_tokens=6)
    first = seeing((ONE, "w5 w6"), gen_config).text
    said = [{"role": "user", "content": [{"type": "image", "image": ONE}, "w5 w6"]}]
    said += [{"role": "assistant", "content": first}, {"role": "user", "content": "w7"}]
    expected = f"{first}\n{seeing(said, gen_config).text}\n"
    near = Conversation(seeing, gen_config, None, None)
    flags = FlagSet()
    chat.define(flags)
    flags.parse(["--url", live.url, "--temperature", "0", "--max-new-tokens", "6"])
    for talker in (near, RemoteConversation(live.url, None, None, flags)):
        talker.show(str(path))
        talker.answer("w5 w6")
        talker.answer("w7")
        assert capsys.readouterr().out == expected
        with pytest.raises(RequestError, match="cannot be read"):
            talker.show("/no/such.png")


def test_words_with_a_slash_are_not_sent(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scribe = Scribe()
    talk(scribe, "/help\n/nope\n/usr/bin\n\nwhat is\n/bye\n\n", monkeypatch)
    assert scribe.heard == ["/usr/bin", "what is\n/bye"]
    told = capsys.readouterr().err.splitlines()
    assert told[0].startswith("[exit or /bye: quit")
    assert told[1].startswith("[/nope is no command.")


def test_a_pasted_text_is_one_message() -> None:
    """In a terminal, as readline has it."""
    code = "from lmdeploy_jax.cli import chat; chat._prepare_terminal(); print(repr(chat._read_message()))"
    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", code]
    with subprocess.Popen(
        command, stdin=theirs, stdout=theirs, cwd=ROOT, env=os.environ | {"TERM": "xterm"}
    ) as process:
        os.close(theirs)
        shown = b""
        while b">>> " not in shown:
            shown += os.read(ours, 1000)
        os.write(ours, b"\x1b[200~one\n\ntwo\x1b[201~\r\r")
        while b"'one" not in shown:
            shown += os.read(ours, 1000)
        process.wait()
    os.close(ours)
    assert b"'one\\n\\ntwo'" in shown


@pytest.mark.parametrize(
    ("flags", "named"),
    [(["--url", "x", "--tp", "4"], "--tp"), (["--url", "x", "--chat-template", "y"], "--chat-template")],
)
def test_flags_of_the_engine_mean_nothing_with_a_server(
    flags: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["chat", *flags]) == 2
    assert f"{named} has no meaning with --url" in capsys.readouterr().err


def test_a_servers_key_needs_a_server(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", "--api-key", "k"]) == 2
    assert "--api-key has a meaning with --url only" in capsys.readouterr().err
