"""The chat page in a headless Chromium, and a model that says what a test wants to see."""

from __future__ import annotations

import shutil
import subprocess
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lmdeploy_jax.engine.request import Request
from tests import patience
from tests.scripted import ENDLESS, TOKENIZER, ids

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@contextmanager
def launched() -> Iterator:
    """A browser; the test is skipped where there is none."""
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("needs Chromium")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def opened(browser, url, **options) -> Iterator:
    """The page in a profile of its own. No script of it may fail, and nothing comes from elsewhere."""
    context = browser.new_context(bypass_csp=True, **options)  # the waits below are scripts of their own
    context.set_default_timeout(patience.PATIENCE * 1000)
    page, faults, asked = context.new_page(), [], []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(url)
    ready(page)
    yield page
    context.close()
    assert not faults
    assert all(address.startswith((url.split("#")[0], "data:")) for address in asked), asked


def ready(page):
    page.wait_for_selector("body[data-ready]")


def send(page, text):
    page.fill("#input", text)
    page.click("#send")


def finished(page, answers=1):
    """The last of so many answers, once it is complete."""
    page.wait_for_function(
        f"document.querySelectorAll('.assistant').length >= {answers}"
        " && document.getElementById('messages').ariaBusy === 'false'"
    )
    return page.locator(".assistant").nth(answers - 1)


def setting(page, name, value):
    """Fill in a setting, as a user does who opens the panel."""
    if page.locator("#settings").is_hidden():
        page.click("#show-settings")
    field = page.locator(f"#{name}")
    if field.evaluate("field => field.tagName") == "SELECT":
        field.select_option(value)
    else:
        field.fill(value)
    field.dispatch_event("change")


MARKDOWN = """## Title

**bold**, [link](https://x.example)

```python
print("hi")
```

- item

|a|
|-|
|b|

$$\\frac{x_1}{2}$$
"""
CALL = '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'
TOOLS = '[{"type": "function", "function": {"name": "clock"}}]'
THOUGHT = "<think>\nHm, let me see.\n</think>\n\nForty-two."
LINES = {"nothing": "", "md": MARKDOWN, "call": CALL, "think": THOUGHT}


class Actor:
    """Answers what `LINES` say for the last word that a user has sent; else repeats that message.

    A message that begins with "endless" is answered without end, and with "halt" up to the middle, until `go`
    is set.
    """

    def __init__(self) -> None:
        self.go = threading.Event()

    def __call__(self, request: Request, index: int) -> Iterable[int]:
        prompt = TOKENIZER.decode(request.prompt.ids, skip_special_tokens=False)
        said = prompt.rpartition("<|im_start|>user\n")[2].partition("<|im_end|>")[0]
        if said.startswith("endless"):
            return ENDLESS
        tokens = ids(LINES.get(said.split()[-1], said))
        return self._halting(tokens) if said.startswith("halt") else tokens

    def _halting(self, tokens: list[int]) -> Iterator[int]:
        yield from tokens[: len(tokens) // 2]
        self.go.wait(patience.PATIENCE)
        yield from tokens[len(tokens) // 2 :]


def asked(page, act):
    """The messages of the request that `act` sends."""
    with page.expect_request("**/v1/chat/completions") as sent:
        act()
    return sent.value.post_data_json["messages"]


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def node_modules() -> list[Path]:
    """Where npm has installed packages: here, and globally."""
    npm = shutil.which("npm")
    places = [Path(__file__).parents[2] / "node_modules"]
    if npm is not None:
        places.append(Path(subprocess.check_output([npm, "root", "-g"], text=True).strip()))
    return places


def accessibility_checker() -> str:
    """The script of axe-core; the test is skipped without."""
    found = [path for place in node_modules() if (path := place / "axe-core" / "axe.min.js").exists()]
    if not found:
        pytest.skip("needs axe-core: npm install --no-save axe-core")
    return found[0].read_text()
