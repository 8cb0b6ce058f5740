"""The chat page in a headless Chromium, and a model that says what a test wants to see."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from lmdeploy_jax.engine.request import Request
from tests import patience
from tests.scripted import TOKENIZER, ids

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


class Actor:
    """Answers what `lines` say for the last word that a user has sent; else repeats that message.

    seen: the prompts as text, in their order.
    """

    def __init__(self, lines: dict[str, str]) -> None:
        self.lines = lines
        self.seen: list[str] = []

    def __call__(self, request: Request, index: int) -> list[int]:
        prompt = TOKENIZER.decode(request.prompt.ids, skip_special_tokens=False)
        self.seen.append(prompt)
        said = prompt.rpartition("<|im_start|>user\n")[2].partition("<|im_end|>")[0]
        return ids(self.lines.get(said.split()[-1], said))
