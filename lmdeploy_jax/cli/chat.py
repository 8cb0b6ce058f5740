"""`chat [MODEL]`: talk to a model in the terminal, or get one answer with --prompt."""

from __future__ import annotations

import contextlib
import importlib
import re
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

from absl import flags as absl_flags

from lmdeploy_jax.cli.engine_flags import HELP, add_engine_flags, engine_config
from lmdeploy_jax.cli.flags import FlagSet, UsageError
from lmdeploy_jax.cli.generation_flags import add_generation_flags, generation_config
from lmdeploy_jax.cli.lmdeploy_flags import add_lmdeploy_flags, check_lmdeploy_flags
from lmdeploy_jax.errors import RequestError
from lmdeploy_jax.logs import set_level
from lmdeploy_jax.messages import GenerationConfig, Response
from lmdeploy_jax.session import Turn
from lmdeploy_jax.stream import failures

if TYPE_CHECKING:
    from PIL import Image

    from lmdeploy_jax.pipeline import Pipeline

DEFAULT_MODEL = "tiny-chat"
QUIT, FORGET, SHOW = "/bye", "/new", "/image"
COMMANDS = {
    "exit": QUIT, "/exit": QUIT, "/quit": QUIT, "/bye": QUIT,
    "end": FORGET, "/end": FORGET, "/new": FORGET, "/clear": FORGET, "/reset": FORGET,
}  # fmt: skip
HELP_WORDS = "exit or /bye: quit, end or /new: forget the conversation, /image FILE: show an image."
INPUT_PROMPT = "\ndouble enter to end input >>> "
USAGE = "chat [MODEL] [FLAGS]"
ABOUT = f"""MODEL is a checkpoint folder, a hub id, or the output of `lmdeploy_jax convert`; without it the
embedded demonstration model {DEFAULT_MODEL}.

An empty line ends a message. `exit`, `/bye` or Ctrl-C at the prompt quits, `end` or `/new` forgets the
conversation, `/image FILE` shows an image with the next message, Ctrl-C during an answer drops that turn.
Sampling follows the checkpoint's generation_config.json and the flags."""


def define(flags: FlagSet) -> None:
    """The flags of the command."""
    text, section = absl_flags.DEFINE_string, "Conversation"
    about = "variable of the chat template; for models that think before they answer"
    flags.add(section, text, "prompt", None, "print the answer to this message and quit")
    shown = "file or URL of an image to show with the first message; may be given several times"
    flags.add(section, absl_flags.DEFINE_multi_string, "image", None, shown)
    flags.add(section, text, "system", None, "system prompt")
    server = "talk to the model of a running server, such as http://localhost:23333, MODEL is its name there"
    flags.add(section, text, "url", None, server)
    flags.add(section, text, "api_key", None, "key that the server of --url asks for")
    flags.add(section, absl_flags.DEFINE_boolean, "enable_thinking", None, about)
    flags.add(section, text, "chat_template", None, "a built-in template's name, or a .json or .jinja file")
    flags.add(section, text, "log_level", "WARNING", "CRITICAL, ERROR, WARNING, INFO, REQUEST or DEBUG")
    add_generation_flags(flags)
    add_engine_flags(flags)
    add_lmdeploy_flags(flags)


def run(flags: FlagSet, args: list[str]) -> int:
    """Answer --prompt, or talk until the user has had enough."""
    if len(args) > 1:
        raise UsageError(
            f"chat takes one model, but was given {' '.join(args)!r}. A text goes after --prompt."
        )
    config = engine_config(flags)
    generation_config(flags)  # raises for wrong values before the model is loaded
    check_lmdeploy_flags(flags)

    if flags["url"] is not None:
        from lmdeploy_jax.cli.remote_chat import RemoteConversation

        flags.refuse((*HELP, "chat_template"), "has no meaning with --url: the server has its model loaded")

        name = args[0] if args else None
        return _converse(flags, RemoteConversation(flags["url"], name, flags["api_key"], flags))

    flags.refuse(("api_key",), "has a meaning with --url only")

    from lmdeploy_jax.engine.prepare import prepare
    from lmdeploy_jax.pipeline import Pipeline, open_frontend

    set_level(flags["log_level"])
    model = prepare(args[0] if args else DEFAULT_MODEL, config, flags["chat_template"])
    gen_config = generation_config(flags, model.folder)
    with Pipeline.from_frontend(open_frontend(model)) as pipe:
        return _converse(flags, Conversation(pipe, gen_config, flags["system"], flags["enable_thinking"]))


class Talker(Protocol):
    """What a conversation must be able to do."""

    def answer(self, text: str) -> None: ...

    def show(self, source: str) -> None: ...

    def forget(self) -> None: ...


def _converse(flags: FlagSet, conversation: Talker) -> int:
    for source in flags["image"] or ():
        conversation.show(source)
    if flags["prompt"] is not None:
        conversation.answer(flags["prompt"])
    else:
        _talk(conversation)
    return 0


class Conversation:
    """A session with its settings; answers are printed as they come."""

    def __init__(
        self, pipe: Pipeline, gen_config: GenerationConfig, system: str | None, enable_thinking: bool | None
    ) -> None:
        self._pipe = pipe
        self._session = pipe.session(gen_config)
        self._system = system
        self._enable_thinking = enable_thinking
        self._images: list[Image.Image] = []  # of the next message

    def answer(self, text: str) -> None:
        """Stream the answer to standard output. Raises `RequestError` where there is none."""
        with _without_log_of_failures():
            last = self._print(text)
        print(flush=True)
        if last is not None and last.finish_reason == "error":
            raise RequestError(last.error_message or "the request failed")
        if last is not None and last.finish_reason == "length":
            print("[the answer was cut off: it reached the length limit]", file=sys.stderr)

    def _print(self, text: str) -> Response | None:
        """Every piece as it comes; the last one."""
        last: Response | None = None
        stream: Any = self._pipe.chat(
            self._turn(text), self._session, stream_response=True, enable_thinking=self._enable_thinking
        )
        with contextlib.closing(stream):  # Ctrl-C between two pieces aborts the request too
            for last in stream:
                print(last.text, end="", flush=True)
        return last

    def show(self, source: str) -> None:
        """An image for the next message, from a file or URL. Raises `RequestError` where there is none."""
        if not self._pipe.frontend.takes_images:
            raise RequestError(f"This model takes no images, such as {source!r}. Open one that does.")
        from lmdeploy_jax.vl import load_image  # text models do without what images need

        self._images.append(load_image(source))

    def forget(self) -> None:
        """Start anew; the system prompt stays."""
        self._session.reset()
        self._images = []

    def _turn(self, text: str) -> Turn:
        images, self._images = self._images, []
        shown: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
        content: Any = [*shown, {"type": "text", "text": text}] if shown else text
        first = self._system is not None and not self._session.history
        system: list[dict[str, Any]] = [{"role": "system", "content": self._system}] if first else []
        return [*system, {"role": "user", "content": content}]


@contextlib.contextmanager
def _without_log_of_failures() -> Iterator[None]:
    """Failed answers are raised and printed, and need not stand in the log too."""
    failures.disabled = True
    try:
        yield
    finally:
        failures.disabled = False


def _talk(conversation: Talker) -> None:
    """Read a message, print the answer, and again."""
    if sys.stdin.isatty():
        _prepare_terminal()
        print(f"An empty line ends a message. {HELP_WORDS} Ctrl-C: stop an answer.")
    while (text := _read_message()) is not None:
        if text == FORGET:
            conversation.forget()
            print("[the conversation was forgotten]", file=sys.stderr)
        elif text.startswith(f"{SHOW} ") and "\n" not in text:
            _show(conversation, text.removeprefix(SHOW).strip(" '\""))
        elif text:
            _answer(conversation, text)


def _prepare_terminal() -> None:
    """Arrow keys and history for input(); a pasted text is one message, whatever lines it has."""
    with contextlib.suppress(ImportError):
        importlib.import_module("readline").parse_and_bind("set enable-bracketed-paste on")


def _answer(conversation: Talker, text: str) -> None:
    """One turn, whose failure or abortion does not end the conversation."""
    try:
        conversation.answer(text)
    except RequestError as error:
        print(f"[{error} `end` starts a new conversation.]", file=sys.stderr)
    except KeyboardInterrupt:
        print("\n[aborted: this turn was dropped]", file=sys.stderr)


def _show(conversation: Talker, source: str) -> None:
    try:
        conversation.show(source)
        print(f"[{source} is shown with the next message]", file=sys.stderr)
    except RequestError as error:
        print(f"[{error}]", file=sys.stderr)


def _read_message() -> str | None:
    """Lines up to an empty one, or a command; None to quit."""
    lines: list[str] = []
    prompt = INPUT_PROMPT if sys.stdin.isatty() else ""
    try:
        while (line := input("" if lines else prompt)) != "":
            command = None if lines else _command(line.strip())
            if command is not None:
                return None if command == QUIT else command
            lines.append(line)
    except KeyboardInterrupt:
        return None
    except EOFError:
        return "\n".join(lines) if lines else None
    return "\n".join(lines)


def _command(word: str) -> str | None:
    """What a line by itself asks for: `QUIT`, `FORGET`, `SHOW` with a file, "" where help was printed; None:
    a message.
    """
    if word in COMMANDS:
        return COMMANDS[word]
    if word.startswith(f"{SHOW} "):
        return word
    if re.fullmatch(r"/[a-z?]+", word):  # one word; what has more slashes may be a path
        complaint = "" if word in ("/help", "/?", SHOW) else f"{word} is no command. "
        print(f"[{complaint}{HELP_WORDS}]", file=sys.stderr)
        return ""
    return None
