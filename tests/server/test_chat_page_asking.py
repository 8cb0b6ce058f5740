"""What the chat page sends, what it does while an answer comes, and where none comes."""

from __future__ import annotations

import itertools

import pytest

from tests.server.browser import TOOLS, asked, assistant, finished, opened, send, setting, user
from tests.server.live import serving


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


def test_an_empty_answer_is_told(page):
    send(page, "say nothing")
    page.locator(".user .error", has_text="is empty").wait_for()
    assert asked(page, lambda: send(page, "second")) == [user("second")]
    finished(page)


def test_a_new_chat_during_an_answer_begins_empty(page, stage):
    stage.engine.gate.clear()
    send(page, "first")
    page.locator("text=Reading the prompt").wait_for()
    page.keyboard.press("Control+Shift+O")
    stage.engine.gate.set()
    assert asked(page, lambda: send(page, "second")) == [user("second")]
    assert "second" in finished(page).inner_text()
    assert page.locator("#list .open").all_inner_texts() == ["second", "first"]


def test_escape_stops_and_what_was_not_answered_is_not_sent(page, stage):
    stage.engine.gate.clear()
    send(page, "first")
    page.locator("text=Reading the prompt").wait_for()
    page.keyboard.press("Escape")
    page.locator(".user", has_text="Stopped.").wait_for()
    stage.engine.gate.set()
    assert asked(page, lambda: send(page, "second")) == [user("second")]
    finished(page)


def pauses(page):
    """Milliseconds between the renderings that the page has asked for."""
    times = page.evaluate(
        "performance.getEntriesByType('resource').filter(({ name }) => name.endsWith('/markdown'))"
        ".map(({ startTime }) => startTime)"
    )
    return [after - before for before, after in itertools.pairwise(times)]


def test_the_send_button_stops_and_scrolling_up_is_respected(browser, stage):
    with opened(browser, stage.url, viewport={"width": 900, "height": 400}) as page:
        send(page, "endless")
        height = "document.getElementById('messages').scrollHeight"
        page.wait_for_function(f"{height} > 600")
        page.locator("#messages").evaluate("box => { box.scrollTop = 0; }")
        page.locator("#to-end").wait_for()
        before = page.evaluate(height)
        page.wait_for_function(f"{height} > {before}")
        assert page.locator("#messages").evaluate("box => box.scrollTop") == 0
        assert min(pauses(page)) >= 200, "it asks for HTML at most five times a second"
        page.click("#to-end")
        page.wait_for_function("document.getElementById('messages').scrollTop > 100")
        assert page.inner_text("#send") == "Stop"
        page.click("#send")
        assert "Stopped." in finished(page).inner_text()
        assert page.inner_text("#send") == "Send"


def test_a_server_with_keys_asks_for_one(browser, stage):
    with serving(stage.frontend, api_keys=["sesame"]) as live, opened(browser, live.url) as page:
        assert "API key" in page.inner_text("#notice")
        assert page.evaluate("document.activeElement.id") == "key"
        page.keyboard.type("sesame")
        page.keyboard.press("Tab")
        page.locator("#model option").first.wait_for(state="attached")
        assert page.locator("#notice").is_hidden()
        send(page, "show md")
        assert finished(page).locator("strong").inner_text() == "bold"
        setting(page, "key", "another")
        page.locator("#input").focus()
        page.locator("#notice", has_text="API key").wait_for()
        assert page.evaluate("document.activeElement.id") == "input", (
            "what is being written goes nowhere else"
        )
        send(page, "hello")
        page.locator(".user .error", has_text="Unauthorized").wait_for()
        assert page.evaluate("document.activeElement.id") == "key"


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
