"""The command line: `lmdeploy_jax COMMAND ...`. A command is imported when it is run, and JAX later still."""

from __future__ import annotations

import difflib
import importlib
import io
import os
import sys
from typing import Protocol

from lmdeploy_jax import __version__
from lmdeploy_jax.cli.flags import PROGRAM, FlagSet, UsageError
from lmdeploy_jax.errors import ConfigError, LmdeployError

COMMANDS = {
    "chat": "talk to a model in the terminal",
    "serve": "answer over HTTP, in OpenAI's protocol and others",
    "lite": "quantise a checkpoint",
    "convert": "write a checkpoint in the form that loads fastest",
    "bench": "measure throughput or latency on fixed work",
    "check_env": "report what is installed, which devices are seen and what works on them",
}
LMDEPLOYS = {
    "list": "The README lists the supported models.",
}
INTERRUPTED = 130  # exit code: 128 and the number of SIGINT, as shells have it


class Command(Protocol):
    """What a command's module offers."""

    USAGE: str  # the command line after the program's name
    ABOUT: str  # a paragraph for --help

    @staticmethod
    def define(flags: FlagSet) -> None:
        """Define the command's flags."""

    @staticmethod
    def run(flags: FlagSet, args: list[str]) -> int:
        """Do the work with parsed flags and positional arguments; return the exit code."""


def run() -> None:
    """Entry point of the console script."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # letters that the terminal's encoding lacks become "?"
    code = main(sys.argv[1:])
    if code == INTERRUPTED:  # else the interpreter waits for threads that compile: XLA cannot be stopped
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def main(argv: list[str]) -> int:
    """Run one command. Exit codes: 0 done, 1 it failed, 2 the command line is wrong, 130 interrupted."""
    try:
        return _dispatch(argv)
    except ConfigError as error:  # what a flag says cannot work; UsageError is one
        return _fail(error, 2)
    except (LmdeployError, OSError, ImportError, UnicodeError) as error:
        return _fail(error, 1)
    except KeyboardInterrupt:
        return INTERRUPTED


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if argv[0] in ("-v", "--version"):
        print(f"{PROGRAM} {__version__}")
        return 0
    name = argv[0].replace("-", "_")
    if name not in COMMANDS:
        raise UsageError(f"Unknown command {argv[0]!r}.{_instead(name)} Commands: {', '.join(COMMANDS)}.")
    command: Command = importlib.import_module(f"{PROGRAM}.cli.{name}")  # type: ignore[assignment]
    return _run(*_subcommand(command, argv[1:]))


def _instead(name: str) -> str:
    """What to do instead of a command that there is not."""
    if name in LMDEPLOYS:
        return " " + LMDEPLOYS[name]
    close = difflib.get_close_matches(name, COMMANDS, n=1)
    return f" Did you mean {close[0]}?" if close else ""


def _subcommand(command: Command, argv: list[str]) -> tuple[Command, list[str]]:
    """The command that a word of `argv` names among those behind `command`, and the other words."""
    known: dict[str, Command] = getattr(command, "SUBCOMMANDS", {})
    place = next((i for i, word in enumerate(argv) if word in known), None)
    if place is None:
        return command, argv
    return known[argv[place]], argv[:place] + argv[place + 1 :]


def _run(command: Command, argv: list[str]) -> int:
    flags = FlagSet()
    command.define(flags)
    if _asks_for_help(argv):
        print(f"usage: {PROGRAM} {command.USAGE}\n\n{command.ABOUT}\n\n{flags.help()}")
        return 0
    return command.run(flags, flags.parse(argv))


def _asks_for_help(argv: list[str]) -> bool:
    options = argv[: argv.index("--")] if "--" in argv else argv
    return any(word in ("-h", "--help") for word in options)


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {about}" for name, about in COMMANDS.items()]
    return "\n".join(
        [
            f"usage: {PROGRAM} COMMAND [ARGUMENTS]",
            "",
            "Commands:",
            *lines,
            "",
            f"{PROGRAM} COMMAND --help lists a command's arguments. Flags may be written --flag-name or",
            "--flag_name, --flag=value or --flag value; --noflag turns a boolean flag off.",
            "",
            "  -h, --help     this text",
            "  -v, --version  the version",
        ]
    )


def _fail(error: BaseException, code: int) -> int:
    message = str(error)
    if isinstance(error, ImportError):
        message = f"a dependency cannot be imported: {error}. `{PROGRAM} check_env` shows what is installed."
    if isinstance(
        error, BrokenPipeError
    ):  # the reader of a pipe has gone: nothing to say, and nowhere to say it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return code
    print(f"{PROGRAM}: {message}", file=sys.stderr)
    return code
