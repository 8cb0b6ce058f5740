"""What users of the chat page do, with a model that says what it is told to."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest

from tests.scripted import ENDLESS
from tests.server.browser import Actor, finished, opened, ready, send, setting
from tests.server.live import serving
from tests.server.scripted import scripted

MARKDOWN = """## Title

**bold**, [link](https://x.example)

```python
print("hi")
```

- item

|a|
|-|
|b|
"""
CALL = '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'
TOOLS = '[{"type": "function", "function": {"name": "clock"}}]'
THOUGHT = "<think>\nHm, let me see.\n</think>\n\nForty-two."


class Stage(Actor):
    """Also speaks without end, or halts after its first words until `go` is set."""

    def __init__(self, lines):
        super().__init__(lines)
        self.go = threading.Event()

    def __call__(self, request, index):
        tokens = super().__call__(request, index)
        said = self.seen[-1].rpartition("<|im_start|>user\n")[2]
        if said.startswith("endless"):
            return ENDLESS
        return self.halting(tokens) if said.startswith("halt") else tokens

    def halting(self, tokens):
        yield from tokens[: len(tokens) // 2]
        self.go.wait(60)
        yield from tokens[len(tokens) // 2 :]


@pytest.fixture(scope="module")
def server():
    actor = Stage({"md": MARKDOWN, "call": CALL, "think": THOUGHT})
    with scripted(actor, session_len=2048) as (frontend, engine), serving(frontend) as live:
        yield SimpleNamespace(actor=actor, engine=engine, url=live.url, frontend=frontend)


@pytest.fixture
def page(browser, server):
    with opened(browser, server.url) as page:
        yield page


def asked(page, act):
    """The messages of the request that `act` sends."""
    with page.expect_request("**/v1/chat/completions") as sent:
        act()
    return sent.value.post_data_json["messages"]


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def key_down(page, **event):
    page.locator("#input").evaluate(
        "(field, event) => field.dispatchEvent(new KeyboardEvent('keydown', {key: 'Enter', cancelable: true, "
        "bubbles: true, ...event}))",
        event,
    )


def test_enter_of_an_input_method_sends_nothing(page):
    page.fill("#input", "ni hao")
    key_down(page, isComposing=True)
    key_down(page, keyCode=229)
    key_down(page, shiftKey=True)
    assert page.input_value("#input") == "ni hao"
    assert asked(page, lambda: key_down(page)) == [user("ni hao")]
    finished(page)


def test_a_refused_message_is_told_in_view_and_leaves_the_conversation(page):
    send(page, "well")
    finished(page)
    send(page, "long " * 3000)
    told = page.locator(".user .error")
    told.wait_for()
    assert "2048" in told.inner_text()
    bottom = page.locator("#messages").bounding_box()
    assert told.bounding_box()["y"] < bottom["y"] + bottom["height"]
    assert asked(page, lambda: send(page, "hi")) == [user("well"), assistant("well"), user("hi")]
    assert "hi" in finished(page, 2).inner_text()
    assert "no part of the conversation" in page.locator(".user").nth(1).inner_text()


def test_a_lost_connection_can_be_tried_again(page):
    page.route("**/v1/chat/completions", lambda route: route.abort())
    send(page, "hello")
    page.locator(".user .error", has_text="cannot be reached").wait_for()
    page.unroute("**/v1/chat/completions")
    assert asked(page, lambda: page.click("text=Try again")) == [user("hello")]
    assert "hello" in finished(page).inner_text()
    assert page.locator(".error:visible").count() == 0


def test_a_new_chat_during_an_answer_begins_empty(page, server):
    server.engine.gate.clear()
    send(page, "first")
    page.locator("text=Reading the prompt").wait_for()
    page.keyboard.press("Control+Shift+O")
    server.engine.gate.set()
    assert asked(page, lambda: send(page, "second")) == [user("second")]
    assert "second" in finished(page).inner_text()
    assert page.locator("#list .open").all_inner_texts() == ["second", "first"]


def test_escape_stops_and_what_was_not_answered_is_not_sent(page, server):
    server.engine.gate.clear()
    send(page, "first")
    page.locator("text=Reading the prompt").wait_for()
    page.keyboard.press("Escape")
    page.locator(".user", has_text="Stopped.").wait_for()
    server.engine.gate.set()
    assert asked(page, lambda: send(page, "second")) == [user("second")]
    finished(page)


def test_the_send_button_stops_and_scrolling_up_is_respected(browser, server):
    with opened(browser, server.url, viewport={"width": 900, "height": 400}) as page:
        send(page, "endless")
        height = "document.getElementById('messages').scrollHeight"
        page.wait_for_function(f"{height} > 600")
        page.locator("#messages").evaluate("box => { box.scrollTop = 0; }")
        page.locator("#to-end").wait_for()
        before = page.evaluate(height)
        page.wait_for_function(f"{height} > {before}")
        assert page.locator("#messages").evaluate("box => box.scrollTop") == 0
        page.click("#to-end")
        page.wait_for_function("document.getElementById('messages').scrollTop > 100")
        assert page.inner_text("#send") == "Stop"
        page.click("#send")
        assert "Stopped." in finished(page).inner_text()
        assert page.inner_text("#send") == "Send"


def test_everything_survives_a_reload(page):
    setting(page, "system", "Be kind.")
    setting(page, "temperature", "0.5")
    setting(page, "key", "sesame")
    send(page, "remember md")
    finished(page)
    page.fill("#input", "half a thought")
    page.reload()
    ready(page)
    assert page.input_value("#input") == "half a thought"
    assert page.locator(".assistant strong").inner_text() == "bold"
    with page.expect_request("**/v1/chat/completions") as sent:
        send(page, "next")
    body = sent.value.post_data_json
    assert body["messages"] == [
        {"role": "system", "content": "Be kind."}, user("remember md"), assistant(MARKDOWN), user("next"),
    ]  # fmt: skip
    assert body["temperature"] == 0.5
    assert sent.value.headers["authorization"] == "Bearer sesame"
    finished(page, 2)


def test_answers_are_rendered_and_code_is_copied(page):
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    send(page, "show md")
    answer = finished(page)
    shown = {"h2": "Title", "strong": "bold", "li": "item", "td": "b", "pre .nb": "print"}
    for selector, text in shown.items():
        assert answer.locator(selector).inner_text() == text
    assert answer.locator("a").get_attribute("href") == "https://x.example"
    answer.locator("button.copy").click()
    answer.locator("button.copy", has_text="Copied").wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == 'print("hi")\n'
    answer.locator(".foot button", has_text="Copy").click()
    answer.locator(".foot button", has_text="Copied").wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == MARKDOWN


def test_an_answer_is_rendered_while_it_comes(page, server):
    server.actor.go.clear()
    send(page, "halt md")
    page.locator(".assistant strong").wait_for()
    assert page.get_attribute("#messages", "aria-busy") == "true"
    server.actor.go.set()
    assert finished(page).locator("td").inner_text() == "b"


def test_what_the_server_cannot_render_is_shown_as_it_is(page):
    page.route("**/markdown", lambda route: route.fulfill(status=500, body="no"))
    send(page, "show md")
    assert "**bold**" in finished(page).inner_text()


def test_thinking_is_seen_live_and_switched(page, server):
    server.actor.go.clear()
    setting(page, "thinking", "on")
    with page.expect_request("**/v1/chat/completions") as sent:
        send(page, "halt think")
    assert sent.value.post_data_json["enable_thinking"] is True
    page.locator("summary", has_text="Thinking").wait_for()
    page.locator(".reasoning", has_text="Hm").wait_for()
    server.actor.go.set()
    answer = finished(page)
    assert answer.locator(".markdown").inner_text() == "Forty-two."
    assert "Thought for" in answer.locator("summary").inner_text()
    assert answer.locator("text=let me see").is_hidden()
    setting(page, "thinking", "off")
    with page.expect_request("**/v1/chat/completions") as sent:
        send(page, "hi")
    assert sent.value.post_data_json["enable_thinking"] is False
    finished(page, 2)


def test_a_server_with_keys_asks_for_one(browser, server):
    with serving(server.frontend, api_keys=["sesame"]) as live, opened(browser, live.url) as page:
        assert "API key" in page.inner_text("#notice")
        assert page.evaluate("document.activeElement.id") == "key"
        page.keyboard.type("sesame")
        page.keyboard.press("Tab")
        page.locator("#model option").first.wait_for(state="attached")
        assert page.locator("#notice").is_hidden()
        send(page, "show md")
        assert finished(page).locator("strong").inner_text() == "bold"


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("temperature", "3", "2"),
        ("top_k", "1.5", ""),
        ("tools", "[", "no JSON"),
        ("schema", "[]", "an object"),
    ],
)
def test_settings_that_cannot_be_sent_are_marked(page, name, value, told):
    setting(page, name, value)
    page.click("#show-settings")
    send(page, "hello")
    field = page.locator(f"#{name}")
    assert field.get_attribute("aria-invalid") == "true"
    assert told in page.inner_text(f"#{field.get_attribute('aria-describedby')}")
    assert page.evaluate("document.activeElement.id") == name
    assert page.input_value("#input") == "hello", "the message is still there"
    setting(page, name, "")
    send(page, "hello")
    finished(page)


def test_a_cut_answer_is_marked_and_continued(page):
    setting(page, "max_tokens", "3")
    send(page, "one two three four five six")
    answer = finished(page)
    assert "Cut at the limit" in answer.inner_text()
    cut = answer.locator(".text").inner_text()
    setting(page, "max_tokens", "")
    messages = asked(page, lambda: answer.locator("text=Continue").click())
    assert messages == [user("one two three four five six"), assistant(cut)]
    whole = finished(page).locator(".text").inner_text()
    assert whole.startswith(cut)
    assert len(whole) > len(cut)


def test_a_call_without_a_result_is_not_sent(page):
    setting(page, "tools", TOOLS)
    send(page, "do call")
    assert finished(page).locator(".tool").inner_text() == "clock({})"
    assert asked(page, lambda: send(page, "never mind")) == [user("never mind")]
    finished(page, 2)
    assert page.locator(".result").count() == 0


def test_a_form_is_sent(page):
    setting(page, "schema", '{"type": "integer"}')
    with page.expect_request("**/v1/chat/completions") as sent:
        send(page, "7")
    form = sent.value.post_data_json["response_format"]
    assert form == {"type": "json_schema", "json_schema": {"name": "answer", "schema": {"type": "integer"}}}
    page.locator(".error, .assistant .figures").first.wait_for()


def test_edit_and_regenerate(page):
    send(page, "one")
    finished(page)
    send(page, "two")
    finished(page, 2)
    again = asked(page, lambda: page.click("text=Regenerate"))
    assert again == [user("one"), assistant("one"), user("two")]
    finished(page, 2)
    page.locator(".user").first.locator("text=Edit").click()
    page.locator("textarea.edit").fill("three")
    assert asked(page, lambda: page.locator("textarea.edit").press("Enter")) == [user("three")]
    assert finished(page).locator(".text").inner_text() == "three"
    assert page.locator(".message").count() == 2


def test_conversations_are_listed_renamed_and_deleted(page):
    page.on("dialog", lambda dialog: dialog.accept())
    for text in ("alpha", "beta"):
        send(page, text)
        finished(page)
        page.click("#new")
    titles = page.locator("#list .open")
    assert titles.all_inner_texts() == ["beta", "alpha"]
    page.click("#list .open >> text=alpha")
    page.locator(".user", has_text="alpha").wait_for()
    page.locator("#list .current [aria-label^=Rename]").click()
    page.keyboard.type("Gamma")
    page.keyboard.press("Enter")
    page.locator("#list .open >> text=Gamma").wait_for()
    page.fill("#search", "alpha")
    assert titles.all_inner_texts() == ["Gamma"]
    page.locator("#list [aria-label^=Delete]").click()
    page.locator("#list li").wait_for(state="detached")
    assert page.locator(".message").count() == 0
    page.fill("#search", "")
    page.reload()
    ready(page)
    assert titles.all_inner_texts() == ["beta"]


def test_figures_names_and_context(page):
    setting(page, "max_tokens", "1")
    send(page, "one two three")
    answer = finished(page)
    figures = answer.locator(".figures").inner_text()
    assert "prompt tokens, 1 token, first after" in figures
    assert "tokens/s" not in figures, "one token has no rate"
    assert answer.locator(".who").inner_text() == "Assistant (tiny-chat)"
    assert page.locator(".user .who").inner_text() == "You"
    assert "of 2,048 tokens" in page.inner_text("#context")
    assert page.locator("#messages").get_attribute("aria-live") is None
    assert page.inner_text("#status") == answer.locator(".text").inner_text()


def test_the_keyboard_is_enough(page):
    assert page.evaluate("document.activeElement.id") == "input"
    low = page.locator("#input").bounding_box()["height"]
    page.keyboard.type("a")
    for _ in range(3):
        page.keyboard.press("Shift+Enter")
    assert page.locator("#input").bounding_box()["height"] > low + 20
    page.keyboard.press("Enter")
    finished(page)
    assert page.locator("#input").bounding_box()["height"] < low + 2


def test_a_phone(browser, server):
    with opened(browser, server.url, viewport={"width": 390, "height": 844}, has_touch=True) as page:
        assert page.evaluate("document.activeElement.id") == "", "a keyboard would cover the page"
        send(page, "show md " + "word " * 40 + "md")
        finished(page)
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        assert page.locator("#messages").bounding_box()["height"] > 0.7 * 844
        box = page.locator("#send").bounding_box()
        assert box["y"] + box["height"] <= 844
        assert page.locator("#settings").is_hidden()
        page.click("#show-settings")
        assert page.locator("#system").is_visible()
        page.click("#show-conversations")
        assert page.locator("#settings").is_hidden(), "one at a time"
        page.keyboard.press("Escape")
        assert page.locator("#conversations").is_hidden()
        assert page.evaluate("document.activeElement.id") == "show-conversations"
