"""Command-line flags: absl's, with `-` and `_` alike, dotted JSON options, and help in sections."""

from __future__ import annotations

import json
import shutil
import textwrap
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from absl import flags as absl_flags

from lmdeploy_jax.cli import config_file
from lmdeploy_jax.errors import ConfigError

PROGRAM = "lmdeploy_jax"
ELSEWHERE = {
    "host": "server_name",
    "port": "server_port",
    "api_key": "api_keys",
    "served_model_name": "model_name",
    "max_model_len": "session_len",
    "context_length": "session_len",
    "tensor_parallel_size": "tp",
    "tp_size": "tp",
    "data_parallel_size": "dp",
    "dp_size": "dp",
    "ep_size": "ep",
    "max_num_seqs": "max_batch_size",
    "max_running_requests": "max_batch_size",
    "max_num_batched_tokens": "max_prefill_token_num",
    "chunked_prefill_size": "max_prefill_token_num",
    "gpu_memory_utilization": "cache_max_entry_count",
    "mem_fraction_static": "cache_max_entry_count",
    "kv_cache_dtype": "quant_policy",
    "quantization": "model_format",
    "enforce_eager": "eager_mode",
}
"""What other engines (vLLM, SGLang) call flags of this one."""


class UsageError(ConfigError):
    """The command line itself is wrong: an unknown command or flag, a missing or unreadable value."""


class FlagSet:
    """The flags of one command, apart from absl's global FLAGS: no library's flag is offered by accident."""

    def __init__(self) -> None:
        self.values = absl_flags.FlagValues()
        self.values.set_gnu_getopt(True)  # flags may follow positional arguments
        self._sections: dict[str, dict[str, str]] = {}  # title -> flag -> help
        # Whether these positional arguments are all that the command takes: words after a list's flag belong
        # to the list then, as LMDeploy has it.
        self.complete: Callable[[list[str]], bool] = lambda words: False
        self.known_only = False  # whether unknown flags stay among the arguments: a subcommand is missing

    def add(
        self, section: str, define: Callable[..., Any], name: str, default: Any, text: str, **rest: Any
    ) -> None:
        """Define a flag through one of absl's DEFINE functions and list it under `section` in the help."""
        define(name=name, default=default, help=text, flag_values=self.values, **rest)
        self._sections.setdefault(section, {})[name] = text

    def parse(self, argv: list[str]) -> list[str]:
        """Set the flags from `argv` and return the positional arguments. Raises `UsageError`."""
        try:
            positional = list(self.values([PROGRAM, *self._canonical(argv)], self.known_only)[1:])
        except (absl_flags.Error, ValueError) as error:
            raise UsageError(config_file.fault_of(error)) from error
        except RecursionError as error:
            raise UsageError("A flag's JSON object is nested too deep to be read.") from error
        if config_file.NAME in self.values and self[config_file.NAME] is not None:
            config_file.apply(self.values, self[config_file.NAME])
        return positional

    def add_config_file(self, section: str) -> None:
        """Define `--config`."""
        self.add(section, absl_flags.DEFINE_string, config_file.NAME, None, config_file.HELP)

    def _canonical(self, argv: list[str]) -> Iterator[str]:
        """`--a-b v` becomes `--a_b=v`, and `--a-b.x.y v` becomes `--a_b={"x": {"y": v}}`."""
        words, positional = deque(argv), []
        while words:
            word = words.popleft()
            if word == "--":
                yield word
                yield from words
                return
            if not word.startswith("-") or word == "-":
                positional.append(word)
                yield word
                continue
            flag = _canonical_flag(self.values, word, words)
            yield flag
            name = flag[2:].partition("=")[0]
            if name in self.values and isinstance(self.values[name], ListFlag) and self.complete(positional):
                while words and not words[0].startswith("-"):
                    yield f"--{name}={words.popleft()}"

    def refuse(self, names: Iterable[str], reason: str) -> None:
        """Raises UsageError for the first of the flags that was given, since it would be ignored."""
        for name in names:
            if self.values[name].present:
                raise UsageError(f"--{name.replace('_', '-')} {reason}.")

    def section(self, name: str) -> str | None:
        """The section that a flag is listed in; None: there is no such flag."""
        return next((title for title, texts in self._sections.items() if name in texts), None)

    def __getitem__(self, name: str) -> Any:
        return self.values[name].value

    def help(self) -> str:
        """One paragraph a section, one entry a flag, with type and default."""
        width = min(100, shutil.get_terminal_size().columns)
        parts = []
        for title, texts in self._sections.items():
            entries = [_describe(self.values[name], text, width) for name, text in texts.items()]
            parts.append("\n".join([f"{title}:", *entries]))
        return "\n\n".join(parts)


class ListFlag(absl_flags.Flag[list[str]]):
    """Texts separated by commas; every further mention adds to them."""

    def parse(self, argument: str | list[str]) -> None:
        before = self.value if self.present and self.value else []
        self.value = [*before, *(self._parse(argument) or [])]
        self.present += 1


def define_list(name: str, default: list[str], help: str, flag_values: absl_flags.FlagValues) -> Any:
    """Define a flag of several texts."""
    flag = ListFlag(absl_flags.ListParser(), absl_flags.ListSerializer(","), name, default, help)
    return absl_flags.DEFINE_flag(flag, flag_values)


class JsonObject(absl_flags.ArgumentParser):
    """Parses a flag value that is a JSON object."""

    def parse(self, argument: Any) -> Any:
        try:
            value = json.loads(argument) if isinstance(argument, str) else argument
        except json.JSONDecodeError as error:
            raise ValueError(f"not valid JSON: {error}") from error
        if not isinstance(value, dict):
            raise ValueError("a JSON object is needed, such as '{\"name\": 1}'")
        return value

    def flag_type(self) -> str:
        return "json"


def define_json(**rest: Any) -> Any:
    """Define a flag of JSON objects; several, and dotted ones, are merged by `merged`."""
    return absl_flags.DEFINE_multi(JsonObject(), absl_flags.ArgumentSerializer(), **rest)


def merged(objects: list[dict[str, Any]] | None) -> dict[str, Any] | None:
    """Deep-merge the objects of a JSON flag, later ones over earlier ones; None if the flag wasn't given."""
    if objects is None:
        return None
    total: dict[str, Any] = {}
    for item in objects:
        _merge(total, item)
    return total


def _merge(into: dict[str, Any], item: dict[str, Any]) -> None:
    for key, value in item.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def _canonical_flag(values: absl_flags.FlagValues, word: str, rest: deque[str]) -> str:
    dashed, equals, value = word.lstrip("-").partition("=")
    root, dot, path = dashed.partition(".")
    name = root.replace("-", "_")
    if name not in values and (ours := ELSEWHERE.get(name, "")) in values:
        raise UsageError(
            f"There is no flag --{root} here; its like is --{ours.replace('_', '-')} (see --help)."
        )
    if name not in values or (values[name].boolean and not dot):
        return f"--{name}{dot}{path}{equals}{value}"
    if not equals:
        if not rest:
            raise UsageError(f"Flag --{dashed} needs a value.")
        value = rest.popleft()
    return f"--{name}={_nested(path, value)}" if dot else f"--{name}={value}"


def _nested(path: str, value: str) -> str:
    try:
        leaf = json.loads(value)
    except json.JSONDecodeError:
        leaf = value  # a bare word is a string
    for key in reversed(path.split(".")):
        leaf = {key: leaf}
    return json.dumps(leaf)


def _describe(flag: absl_flags.Flag[Any], text: str, width: int) -> str:
    name = flag.name.replace("_", "-")
    head = f"  --[no]{name}" if flag.boolean else f"  --{name} {_type_name(flag)}"
    if flag.default not in (None, []):
        text += f" (default: {_default_text(flag.default)})"
    body = textwrap.fill(text, width, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return f"{head}\n{body}"


def _type_name(flag: absl_flags.Flag[Any]) -> str:
    if isinstance(flag.parser, absl_flags.EnumParser):
        return "{" + ",".join(flag.parser.enum_values) + "}"
    if isinstance(flag, ListFlag):
        return "TEXT,TEXT,…"
    names = {"int": "N", "float": "X", "json": "JSON"}
    kind = flag.flag_type().removeprefix("multi ")
    return names.get(kind, "TEXT")


def _default_text(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(value)
    return ("on" if value else "off") if isinstance(value, bool) else str(value)
