"""The chat page in a headless Chromium; skipped where there is none."""

from __future__ import annotations

import json
import shutil
from base64 import b64encode
from contextlib import contextmanager

import pytest
from PIL import Image

from lmdeploy_jax import GenerationConfig
from tests import patience
from tests.server.live import serving
from tests.vision.media import PNG

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


@contextmanager
def opened(browser, url):
    page = browser.new_page(bypass_csp=True)  # the waits below are scripts of their own
    faults = []
    page.set_default_timeout(patience.PATIENCE * 1000)
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.goto(url)
    page.wait_for_function("document.querySelectorAll('#model option').length > 0")
    yield page
    page.close()
    assert not faults


@pytest.fixture
def page(browser, live):
    with opened(browser, live.url) as page:
        yield page


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
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "img-src data:" in policy, "the page shows the images that it sends"


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


GIVEN = """([kind, bytes]) => {
  const transfer = new DataTransfer();
  transfer.items.add(new File([new Uint8Array(bytes)], "a.png", { type: "image/png" }));
  transfer.items.add(new File(["no image"], "a.txt", { type: "text/plain" }));
  const options = { bubbles: true, cancelable: true };
  document.getElementById("input").dispatchEvent(kind === "paste"
    ? new ClipboardEvent(kind, { clipboardData: transfer, ...options })
    : new DragEvent(kind, { dataTransfer: transfer, ...options }));
}"""


def test_images_are_attached_pasted_and_dropped(browser, seeing, tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(PNG)
    url = "data:image/png;base64," + b64encode(PNG).decode()
    shown = {"type": "image_url", "image_url": {"url": url}}
    with serving(seeing.frontend) as live, opened(browser, live.url) as page:
        page.fill("#temperature", "0")
        page.fill("#max_tokens", "4")
        page.locator("#attach").wait_for()
        page.set_input_files("#files", path)
        for kind in ("paste", "drop"):
            page.evaluate(GIVEN, [kind, list(PNG)])
        page.wait_for_function("document.querySelectorAll('#attached img').length === 3")
        page.locator("#attached img").first.click()
        with page.expect_request("**/v1/chat/completions") as sent:
            send(page, "w5 w6")
        asked = {"role": "user", "content": [shown, shown, {"type": "text", "text": "w5 w6"}]}
        assert sent.value.post_data_json["messages"] == [asked]
        image = Image.open(path)
        assert finished(page).locator(".text").inner_text() == said(seeing, ([image, image], "w5 w6"))
        page.wait_for_function(
            "[...document.querySelectorAll('.user img')].every((i) => i.naturalWidth === 7)"
        )
        assert page.locator(".user img").count() == 2
        assert page.locator("#attached img").count() == 0
        with page.expect_request("**/v1/chat/completions") as again:
            send(page, "w7")
        assert again.value.post_data_json["messages"][0] == asked
        assert again.value.post_data_json["messages"][2] == {"role": "user", "content": "w7"}
        finished(page, 2)


def said(pipe, prompt):
    return pipe(prompt, GenerationConfig(max_new_tokens=4)).text


def test_a_text_model_offers_no_images(page):
    page.evaluate(GIVEN, ["paste", list(PNG)])
    assert page.locator("#attach").is_hidden()
    assert page.locator("#attached img").count() == 0


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
