"""What the chat page shows and keeps."""

from __future__ import annotations

import pytest

from tests.server.browser import (
    LINES,
    MARKDOWN,
    TOOLS,
    accessibility_checker,
    assistant,
    finished,
    opened,
    ready,
    send,
    setting,
    user,
)
from tests.server.hostile_markdown import HOSTILE


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


def test_formulas_are_laid_out(page):
    send(page, "show md")
    fraction = finished(page).locator("math > mrow > mfrac")
    assert fraction.evaluate("element => element.namespaceURI").endswith("/MathML")
    above, below = (part.bounding_box() for part in fraction.locator("> mrow").all())
    assert above["y"] + above["height"] <= below["y"], "one stands above the other"


def test_nothing_hostile_runs(page, monkeypatch):
    """Without the page's policy, which would stop it too."""
    monkeypatch.setitem(LINES, "hostile", "\n\n".join(HOSTILE))
    page.on("dialog", lambda dialog: pytest.fail(dialog.message))
    send(page, "be hostile")
    answer = finished(page)
    assert answer.locator(".markdown p").count() > 20
    assert answer.locator("script, img, svg, iframe, style, [style], [onclick], [onerror]").count() == 0


def test_an_answer_is_rendered_while_it_comes(page, stage):
    stage.actor.go.clear()
    send(page, "halt md")
    page.locator(".assistant strong").wait_for()
    assert page.get_attribute("#messages", "aria-busy") == "true"
    stage.actor.go.set()
    assert finished(page).locator("td").inner_text() == "b"


def test_a_very_long_answer_is_rendered_in_parts(page):
    """The server takes 64,000 characters at once."""
    page.evaluate(
        "async (text) => { const { Markdown } = await import('/static/markdown.js');"
        " await new Markdown(document.getElementById('messages')).finish(text); }",
        "so *it* goes\n\n" * 7000,
    )
    assert page.locator("em").count() == 7000
    assert page.locator("p", has_text="so it goes").count() == 7000


def test_what_the_server_cannot_render_is_shown_as_it_is(page):
    page.route("**/markdown", lambda route: route.fulfill(status=500, body="no"))
    send(page, "show md")
    assert "**bold**" in finished(page).inner_text()


def test_thinking_is_seen_live_and_switched(page, stage):
    stage.actor.go.clear()
    setting(page, "thinking", "on")
    with page.expect_request("**/v1/chat/completions") as sent:
        send(page, "halt think")
    assert sent.value.post_data_json["enable_thinking"] is True
    page.locator("summary", has_text="Thinking").wait_for()
    page.locator(".reasoning", has_text="Hm").wait_for()
    stage.actor.go.set()
    answer = finished(page)
    assert answer.locator(".markdown").inner_text() == "Forty-two."
    assert "Thought for" in answer.locator("summary").inner_text()
    assert answer.locator("text=let me see").is_hidden()
    setting(page, "thinking", "off")
    with page.expect_request("**/v1/chat/completions") as sent:
        send(page, "hi")
    assert sent.value.post_data_json["enable_thinking"] is False
    finished(page, 2)


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


def test_two_tabs_show_the_same(page, stage):
    send(page, "alpha")
    finished(page)
    other = page.context.new_page()
    other.goto(page.url)
    ready(other)
    finished(other)
    send(page, "beta")
    assert finished(page, 2).locator(".text").inner_text() == "beta"
    other.locator(".assistant", has_text="beta").wait_for()
    with other.expect_request("**/v1/chat/completions") as sent:
        send(other, "gamma")
    assert [message["content"] for message in sent.value.post_data_json["messages"]] == [
        "alpha", "alpha", "beta", "beta", "gamma",
    ]  # fmt: skip
    finished(other, 3)


def test_what_is_deleted_while_it_is_answered_stays_deleted(page, stage):
    page.on("dialog", lambda dialog: dialog.accept())
    stage.actor.go.clear()
    send(page, "halt here and there")
    page.locator(".assistant .text").wait_for()
    page.locator("#list [aria-label^=Delete]").click()
    page.locator("#list li").wait_for(state="detached")
    stage.actor.go.set()
    send(page, "next")
    finished(page)
    assert page.locator("#list .open").all_inner_texts() == ["next"]


def test_a_browser_that_keeps_nothing_says_so(browser, stage):
    with opened(browser, stage.url) as page:
        page.add_init_script("Object.defineProperty(window, 'indexedDB', { value: undefined })")
        page.reload()
        ready(page)
        send(page, "hello")
        page.locator("#notice", has_text="does not keep the conversation").wait_for()
        assert finished(page).locator(".text").inner_text() == "hello"


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


def test_a_phone(browser, stage):
    with opened(browser, stage.url, viewport={"width": 390, "height": 844}, has_touch=True) as page:
        assert page.evaluate("document.activeElement.id") == "", "a keyboard would cover the page"
        assert page.locator("main").bounding_box()["width"] == 390
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


VIOLATIONS = """async () => (await axe.run()).violations.flatMap(
    ({ id, nodes }) => nodes.map((node) => `${id}: ${node.html} ${node.failureSummary}`))"""


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_it_is_accessible(browser, stage, width, scheme):
    """By axe-core's rules, with everything on the page that it can show."""
    axe = accessibility_checker()
    size = {"width": width, "height": 800}
    with opened(browser, stage.url, viewport=size, color_scheme=scheme) as page:
        page.evaluate(axe)
        assert page.evaluate(VIOLATIONS) == []
        send(page, "show md")
        finished(page)
        send(page, "long " * 3000)
        page.locator(".user .error").wait_for()
        send(page, "do think")
        finished(page, 2).locator("summary").click()
        setting(page, "tools", TOOLS)
        setting(page, "temperature", "9")
        assert page.evaluate(VIOLATIONS) == []
        setting(page, "temperature", "")
        page.click("#show-settings")
        send(page, "do call")
        finished(page, 3)
        page.locator(".user").last.locator("text=Edit").click()
        assert page.evaluate(VIOLATIONS) == []
        if width < 800:
            page.click("#show-conversations")
            assert page.evaluate(VIOLATIONS) == []
