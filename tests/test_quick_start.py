"""Every block of the quick start runs and prints what the page says, in both languages."""

from __future__ import annotations

import re
import shlex
import sys
import tomllib
from collections.abc import Iterator
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass, field, replace
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import lmdeploy_jax
from lmdeploy_jax.cli import chat, proxy, serve
from lmdeploy_jax.cli.engine_flags import engine_config
from lmdeploy_jax.cli.flags import FlagSet
from lmdeploy_jax.cli.main import main
from lmdeploy_jax.server.http import sockets
from tests.patience import get, post, wait_until
from tests.proxy.test_proxy import proxied
from tests.server.live import serving

ROOT = Path(lmdeploy_jax.__file__).parent.parent
ENGLISH, CHINESE = (ROOT / "docs" / f"quick_start{language}.md" for language in ("", "_zh-CN"))
HOST = "http://localhost:"
SEVERAL = "--tp 2 --dp 2"  # begins the part that needs several devices


@dataclass
class Block:
    """A block of code, and the text that the page shows as its output; None where it shows none."""

    language: str
    code: str
    output: str | None = None


def blocks(page: Path) -> list[Block]:
    found: list[Block] = []
    for language, text in re.findall(r"^```(\w+)\n(.*?)^```$", page.read_text(), re.M | re.S):
        if language == "text":
            assert found[-1].output is None, f"two outputs of {found[-1].code!r}"
            found[-1].output = text
        else:
            found.append(Block(language, text))
    return found


def _shown(flags: FlagSet) -> str:
    """The URL that the command tells."""
    address = SimpleNamespace(server_name=flags["server_name"], ssl_certfile=flags["ssl_certfile"])
    return sockets.url_of(address, flags["server_port"], local=True)


@dataclass
class Reader:
    """Runs the blocks one after another, as somebody does who follows the page."""

    names: dict[str, Any] = field(default_factory=lambda: {"__name__": "quick_start"})
    stack: ExitStack = field(default_factory=ExitStack)
    urls: dict[str, str] = field(default_factory=dict)
    """Where what the page calls so is."""

    def run(self, block: Block) -> str:
        """What the block prints."""
        code = block.code
        for shown, url in self.urls.items():
            code = code.replace(shown, url)
        if block.language == "python":
            return self._printed(lambda: exec(code, self.names))
        words = shlex.split(code, comments=True)
        return self._install(words) if words[0] == "pip" else self._command(words)

    def _command(self, words: list[str]) -> str:
        assert words[0] == "lmdeploy_jax"
        if words[1] == "serve":
            return self._serve(words[2:])
        return self._printed(lambda: main(words[1:]))

    def _serve(self, words: list[str]) -> str:
        """The server of the command, in this process and on a port of its own."""
        if words[0] == "proxy":
            return self._proxy(words[1:])
        flags = FlagSet()
        serve.define(flags)
        _, model = flags.parse(words)
        options = {"backend_config": engine_config(flags), "progress": False}
        pipe = self.stack.enter_context(sys.modules["lmdeploy_jax.pipeline"].pipeline(model, **options))
        live = self.stack.enter_context(
            serving(pipe.frontend, model_name=model, proxy_url=flags["proxy_url"])
        )
        shown = _shown(flags)
        self.urls[shown] = live.url
        if flags["proxy_url"]:  # the server is in use once the proxy knows it
            wait_until(lambda: get(flags["proxy_url"] + "/health").status_code == 200)
        return f"Serving {live.service.models[0]} at {shown}\n"

    def _proxy(self, words: list[str]) -> str:
        flags = FlagSet()
        proxy.define(flags)
        flags.parse(words)
        shown = _shown(flags)
        url = self.stack.enter_context(proxied(routing_strategy=flags["routing_strategy"]))
        self.urls[shown] = url
        return f"Proxy at {shown}\n"

    @staticmethod
    def _install(words: list[str]) -> str:
        assert words == ["pip", "install", "."]
        return ""

    @staticmethod
    def _printed(run: Any) -> str:
        with redirect_stdout(StringIO()) as out:
            assert not run()
        return out.getvalue()


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Reader]:
    """Engines compile what they need, once for all of the page."""
    for module in (sys.modules["lmdeploy_jax.pipeline"], chat):
        config = module.engine_config

        def quick(given: Any, config: Any = config) -> Any:
            return replace(config(given), eager_mode=True, compile_cache_dir=tmp_path)

        monkeypatch.setattr(module, "engine_config", quick)
    monkeypatch.chdir(tmp_path)  # for files that a page writes
    reader = Reader()
    with reader.stack:
        yield reader


def pattern(output: str) -> str:
    """The output as an expression in which "…" stands for the rest of a line and further lines may follow."""
    lines = [re.escape(line).replace("…", ".*") for line in output.splitlines()]
    return "(?:.*\n)*?".join(f"{line}\n" for line in lines) + "(?:.*\n)*"


def in_several() -> tuple[list[Block], list[Block]]:
    """The page's blocks but for those of the part about several devices, and these."""
    found = blocks(ENGLISH)
    first = next(i for i, block in enumerate(found) if SEVERAL in block.code)
    return found[:first] + found[first + 4 :], found[first : first + 4]


def test_every_block_prints_what_the_page_says(reader: Reader) -> None:
    follow(reader, in_several()[0])


@pytest.mark.full
def test_several_devices_and_servers_do_what_the_page_says(
    reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each copy's process sees two devices."""
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
    follow(reader, in_several()[1])
    asked = {
        "model": "tiny-chat",
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
    }
    answer = post(reader.urls[f"{HOST}23333"] + "/v1/chat/completions", json=asked | {"temperature": 0})
    assert answer.json()["choices"][0]["message"]["content"] == "Paris"


def follow(reader: Reader, page: list[Block]) -> None:
    for block in page:
        printed = reader.run(block)
        if block.output is None:
            assert printed == "", block.code
        elif "…" in block.output:
            assert re.fullmatch(pattern(block.output), printed), (block.code, printed)
        else:
            assert printed == block.output, block.code


def test_the_pages_have_the_same_blocks_and_parts() -> None:
    assert blocks(ENGLISH) == blocks(CHINESE)
    assert headings(ENGLISH) == [1, 2, 3, 3, 3, 3, 3, 2, 3, 3, 3, 2, 2]


@pytest.mark.parametrize("page", ["README", "docs/quick_start"])
def test_both_languages_have_the_same_commands(page: str) -> None:
    english, chinese = (ROOT / f"{page}{language}.md" for language in ("", "_zh-CN"))
    for what in (r"^```\w+\n.*?^```$", r"`lmdeploy_jax [^`]*`"):
        ours, theirs = (re.findall(what, text.read_text(), re.M | re.S) for text in (english, chinese))
        assert ours == theirs
    assert headings(english) == headings(chinese)


def headings(page: Path) -> list[int]:
    """The levels of a page's headings, in their order."""
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    return [len(marks) for marks in re.findall(r"^(#+) ", prose, re.M)]


def test_the_extras_that_the_pages_install_are_there() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(re.findall(r"'\.\[(\w+)\]'", ENGLISH.read_text())) <= extras.keys()
