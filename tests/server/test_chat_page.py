"""The chat page in a headless Chromium; skipped where there is none."""

from __future__ import annotations

import json
import shutil

import pytest

from tests import patience
from tests.server.live import serving

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CALCULATOR = {
    "type": "function",
    "function": {
        "name": "calculator",
        "description": "Evaluate an arithmetic expression.",
        "parameters": {"type": "object", "properties": {"expression": {"type": "string"}}},
    },
}


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("needs Chromium")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, live):
    page = browser.new_page(bypass_csp=True)  # the waits below are scripts of their own
    faults = []
    page.set_default_timeout(patience.PATIENCE * 1000)
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.goto(live.url)
    page.wait_for_function("document.querySelectorAll('#model option').length > 0")
    yield page
    page.close()
    assert not faults


def send(page, text):
    page.fill("#input", text)
    page.click("#send")


def finished(page, answers=1):
    page.wait_for_function(f"document.querySelectorAll('.assistant').length >= {answers} && !running")
    return page.locator(".assistant").nth(answers - 1)


def test_the_page_needs_nothing_from_elsewhere(live):
    answer = patience.get(live.url)
    assert answer.status_code == 200
    assert "https://" not in answer.text
    assert "default-src 'none'" in answer.headers["content-security-policy"]


def test_a_conversation(page, pipe):
    page.fill("#temperature", "0")
    send(page, "My name is Anna.")
    finished(page)
    send(page, "What is my name?")
    assert "Anna" in finished(page, 2).locator(".text").inner_text()


def test_tools_are_shown_apart_and_answered(page):
    page.fill("#temperature", "0")
    page.fill("#tools", json.dumps([CALCULATOR]))
    send(page, "Use the calculator: what is 17 * 23?")
    answer = finished(page)
    assert answer.locator(".tool").inner_text().startswith("calculator({")
    answer.locator("input.result").fill("391")
    answer.locator("input.result").press("Enter")
    assert "391" in finished(page, 2).locator(".text").inner_text()


def test_the_stop_button(page, live):
    page.fill("#temperature", "0")
    page.route("**/v1/chat/completions", lambda route: endless(route))
    send(page, "Tell me something.")
    page.wait_for_function("!document.querySelector('#stop').disabled")
    page.click("#stop")
    assert "stopped" in finished(page).inner_text()


def endless(route):
    body = json.loads(route.request.post_data) | {"ignore_eos": True}
    route.continue_(post_data=json.dumps(body))


def test_errors_are_shown(page):
    page.fill("#max_tokens", "0")
    send(page, "hello")
    assert "max_tokens" in finished(page).locator(".error").inner_text()


def test_the_docs_page_lists_the_routes_offline(browser, live):
    page = browser.new_page(bypass_csp=True)
    asked, faults = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.set_default_timeout(patience.PATIENCE * 1000)
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.goto(live.url + "/docs")
    page.wait_for_function("document.querySelectorAll('details').length > 10")
    chat = page.locator("details", has_text="/v1/chat/completions").first
    chat.locator("summary").click()
    assert "messages\t" in chat.inner_text()
    assert not faults
    assert all(url.startswith(live.url) for url in asked), asked
    page.close()


def test_the_docs_page_can_be_left_out(pipe):
    with serving(pipe.frontend, disable_fastapi_docs=True) as bare:
        assert patience.get(bare.url + "/docs").status_code == 404
        assert patience.get(bare.url + "/openapi.json").status_code == 404
