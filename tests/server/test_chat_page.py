"""The chat page in a headless Chromium; skipped where there is none."""

from __future__ import annotations

import json
import re
from base64 import b64encode
from io import BytesIO

import pytest
from PIL import Image

from lmdeploy_jax import pipeline
from lmdeploy_jax.assets import EXAMPLE_IMAGE, vision_tasks
from tests import patience
from tests.engine.harness import config
from tests.server.browser import finished, opened, send, setting
from tests.server.live import serving
from tests.vision.media import PNG

CALCULATOR = {
    "type": "function",
    "function": {
        "name": "calculator",
        "description": "Evaluate an arithmetic expression.",
        "parameters": {"type": "object", "properties": {"expression": {"type": "string"}}},
    },
}


def test_the_pages_need_nothing_from_elsewhere(live):
    for path in ("/", "/docs"):
        answer = patience.get(live.url + path)
        assert answer.status_code == 200
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert not re.search("https?:", policy)
        files = re.findall(r'(?:src|href)="([^"]*\.(?:js|css))"', answer.text)
        assert files
        for name in files:
            assert "//" not in name
            assert patience.get(f"{live.url}/{name}").headers["x-content-type-options"] == "nosniff"


def test_the_model_card_says_what_the_page_may_offer(live):
    card = patience.get(f"{live.url}/v1/models").json()["data"][0]
    assert card["supported_parameters"] == ["tools", "enable_thinking"]


def test_a_conversation_under_the_policy(browser, live):
    """The page's own policy holds, which other tests leave out since their waits are scripts."""
    page = browser.new_page()
    told = []
    page.on("console", lambda message: message.type in ("error", "warning") and told.append(message.text))
    page.set_default_timeout(patience.PATIENCE * 1000)
    page.goto(live.url)
    page.wait_for_selector("body[data-ready]")
    setting(page, "temperature", "0")
    send(page, "My name is Anna.")
    page.wait_for_selector(".assistant >> text=Regenerate")
    send(page, "What is my name?")
    assert "Anna" in page.locator(".assistant").nth(1).locator(".text", has_text="Anna").inner_text()
    page.close()
    assert not told


def test_tools_are_shown_apart_and_answered(browser, live):
    with opened(browser, live.url) as page:
        setting(page, "temperature", "0")
        setting(page, "tools", json.dumps([CALCULATOR]))
        send(page, "Use the calculator: what is 17 * 23?")
        answer = finished(page)
        assert answer.locator(".tool").inner_text().startswith("calculator({")
        answer.locator(".result").fill("391")
        answer.locator(".result").press("Enter")
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


@pytest.fixture(scope="module")
def tiny_vision(tmp_path_factory):
    with pipeline("tiny-vision", config(tmp_path_factory.mktemp("xla")), progress=False) as pipe:
        yield pipe


def as_png(image):
    held = BytesIO()
    image.save(held, "PNG")
    return held.getvalue()


def test_an_attached_image_is_seen(browser, tiny_vision):
    """And is part of the conversation from then on."""
    with serving(tiny_vision.frontend) as live, opened(browser, live.url) as page:
        page.locator("#attach").wait_for()
        page.set_input_files("#files", EXAMPLE_IMAGE)
        page.locator("#attached img").wait_for()
        with page.expect_request("**/v1/chat/completions") as sent:
            send(page, "Where is the star?")
        assert finished(page).locator(".text").inner_text() == "right"
        assert page.locator(".user img").evaluate("i => i.naturalWidth") == Image.open(EXAMPLE_IMAGE).width
        with page.expect_request("**/v1/chat/completions") as again:
            send(page, "What colour is the star?")
        assert finished(page, 2).locator(".text").inner_text() == "blue"
        first, _, second = again.value.post_data_json["messages"]
        assert [first] == sent.value.post_data_json["messages"]
        assert second == {"role": "user", "content": "What colour is the star?"}


def test_pasted_and_dropped_images_are_compared(browser, tiny_vision):
    """One of three is taken away again; what was no image is not there."""
    (example,) = vision_tasks.held_out("compare", 1, seed=4)
    images = [as_png(image) for image in vision_tasks.images_of(example)]
    question = example.messages[0]["content"][-1]["text"]
    with serving(tiny_vision.frontend) as live, opened(browser, live.url) as page:
        page.locator("#attach").wait_for()
        for count, (kind, image) in enumerate(
            zip(("paste", "paste", "drop"), [PNG, *images], strict=True), 1
        ):
            page.evaluate(GIVEN, [kind, list(image)])
            page.wait_for_function(f"document.querySelectorAll('#attached img').length === {count}")
        page.locator("#attached img").first.click()
        with page.expect_request("**/v1/chat/completions") as sent:
            send(page, question)
        urls = ["data:image/png;base64," + b64encode(image).decode() for image in images]
        shown = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
        asked = {"role": "user", "content": [*shown, {"type": "text", "text": question}]}
        assert sent.value.post_data_json["messages"] == [asked]
        assert finished(page).locator(".text").inner_text() == example.answer
        assert page.locator(".user img").count() == 2
        assert page.locator("#attached img").count() == 0


def test_a_text_model_offers_no_images(page):
    page.evaluate(GIVEN, ["paste", list(PNG)])
    assert page.locator("#attach").is_hidden()
    assert page.locator("#attached img").count() == 0


def test_the_docs_page_lists_the_routes_offline(browser, live):
    page = browser.new_page()
    asked, faults = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: faults.append(message.text))
    page.set_default_timeout(patience.PATIENCE * 1000)
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.goto(live.url + "/docs")
    page.locator("details").nth(10).wait_for()
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
