"""The page in a real browser, against a scripted API. In every test: no request to another host, no script error."""

from __future__ import annotations

import re
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from serving.gateway.auth import AccessMiddleware, HostCheck, KeyCheck, OriginCheck
from tests.ui.browser import Watcher
from tests.ui.chat_page import answers, composer, expect_idle, prompts, retry, say, sent, stop_button
from tests.ui.conftest import Site
from tests.ui.scripted_api import WAIT_S, ScriptedApi, ServerThread, free_port
from ui.app import mount_page

pytestmark = pytest.mark.system

HOSTILE = (
    "<script>window.pwned = 1</script>",
    '<img src="x" onerror="window.pwned = 2">',
    '<svg onload="window.pwned = 3"><circle r="4"/></svg>',
    '<iframe srcdoc="<script>parent.pwned = 4</script>"></iframe>',
    "[click](javascript:window.pwned=5)",
    '<a href="javascript:window.pwned=6">click</a>',
    "![leak](https://attacker.example/leak.png)",
    '<img src="https://attacker.example/leak2.png">',
    "<style>@import url(https://attacker.example/x.css);</style>",
    '```mermaid\ngraph TD\nA["<img src=x onerror=window.pwned=7>"] --> B\n```',
    "```html\n<script>window.pwned = 8</script>\n```",
    "`<img src=x onerror=window.pwned=9>`",
    '<div onmouseover="window.pwned = 10" style="position:fixed;inset:0">cover</div>',
    "$$\\href{javascript:window.pwned=11}{x}$$",
)


def test_text_appears_while_it_streams_with_figures_under_it(page: Page, api: ScriptedApi) -> None:
    api.will_answer("Once ", "upon ", "a time 很久以前 🌱", is_gated=True)
    say(page, "Tell me a story")
    expect(prompts(page)).to_have_text("Tell me a story")
    expect(composer(page)).to_have_value("")
    api.release()
    expect(answers(page)).to_contain_text("Once")
    expect(stop_button(page)).to_be_visible()
    api.release(2)
    expect(answers(page)).to_contain_text("Once upon a time 很久以前 🌱")
    expect(answers(page).locator(".causerie-stats")).to_have_text(
        re.compile(r"first token \d+(\.\d)? m?s · [\d.]+ tokens/s · 3 tokens")
    )
    expect_idle(page)
    assert api.requests[0]["stream"] is True
    assert api.requests[0]["model"] == "scripted-135m"
    assert sent(api, 0) == [("user", "Tell me a story")]


def test_markdown_and_code_are_drawn(page: Page, api: ScriptedApi) -> None:
    api.will_answer("A **bold** word\n\n```python\ndef f(x):\n    return x < 1\n```\n")
    say(page, "code")
    expect(answers(page).locator("strong")).to_have_text("bold")
    expect(answers(page).locator("pre code")).to_have_text("def f(x):\n    return x < 1\n")
    expect(answers(page).locator("pre .token.keyword").first).to_have_text("def")


def test_stop_hangs_up_and_keeps_what_was_said(page: Page, api: ScriptedApi) -> None:
    api.will_answer("one ", "two ", "three", is_gated=True)
    say(page, "Count")
    api.release(2)
    expect(answers(page)).to_contain_text("one two")
    expect(stop_button(page)).to_be_visible()
    stop_button(page).click()
    assert api.hung_up.wait(WAIT_S), "the stream to the API was not closed"
    expect(answers(page).locator(".causerie-stats")).to_contain_text("stopped")
    expect_idle(page)
    say(page, "Go on")
    expect(answers(page).nth(1)).to_contain_text("fine")
    assert sent(api, 1) == [("user", "Count"), ("assistant", "one two "), ("user", "Go on")]


def test_stop_before_the_first_token(page: Page, api: ScriptedApi) -> None:
    api.will_answer("never", is_gated=True)
    say(page, "A long prompt")
    expect(page.locator(".causerie-waiting")).to_be_visible()
    expect(stop_button(page)).to_be_visible()
    stop_button(page).click()
    assert api.hung_up.wait(WAIT_S)
    expect_idle(page)
    expect(page.locator(".causerie-waiting")).to_have_count(0)


def test_closing_the_page_hangs_up(page: Page, api: ScriptedApi) -> None:
    api.will_answer("one ", "two", is_gated=True)
    say(page, "Count")
    api.release()
    expect(answers(page)).to_contain_text("one")
    page.close()
    assert api.hung_up.wait(WAIT_S), "the stream to the API was not closed"


def test_retry_asks_the_same_again_in_place(page: Page, api: ScriptedApi) -> None:
    api.will_answer("first try")
    api.will_answer("second try")
    say(page, "Hello")
    expect(answers(page)).to_contain_text("first try")
    expect_idle(page)
    retry(page)
    expect(answers(page)).to_contain_text("second try")
    expect(answers(page)).not_to_contain_text("first try")
    expect(prompts(page)).to_have_count(1)
    assert sent(api, 1) == sent(api, 0)


def test_editing_a_message_answers_it_anew(page: Page, api: ScriptedApi) -> None:
    for answer in ("fine", "In France", "Both in France"):
        api.will_answer(answer)
    say(page, "Who?")
    expect(answers(page)).to_contain_text("fine")
    expect_idle(page)
    say(page, "Where is <b>Lyon</b>?")
    expect(answers(page).last).to_contain_text("In France")
    expect_idle(page)
    page.locator("#chatbot").get_by_label("Edit").last.click(force=True)
    editor = page.locator("#chatbot textarea")
    expect(editor).to_be_visible()
    editor.press("End")
    editor.type(" And Nice?")
    page.locator("#chatbot").get_by_label("Submit").click()
    expect(answers(page).last).to_contain_text("Both in France")
    expect(prompts(page).last).to_contain_text("Where is <\u200bb>Lyon<\u200b/b>? And Nice?")
    expect(answers(page)).to_have_count(2)
    assert sent(api, 2) == [("user", "Who?"), ("assistant", "fine"), ("user", "Where is <b>Lyon</b>? And Nice?")]


def test_a_refused_message_gets_a_kind_notice_and_is_not_sent_again(page: Page, api: ScriptedApi) -> None:
    api.will_refuse(400, "content_filter", "flagged: violence")
    say(page, "something harmful")
    expect(page.locator(".causerie-notice.refused")).to_contain_text("safety filter")
    expect_idle(page)
    say(page, "something else")
    expect(answers(page).nth(1)).to_contain_text("fine")
    assert sent(api, 1) == [("user", "something else")]


def test_a_refusal_that_comes_as_an_answer_is_not_sent_again(page: Page, api: ScriptedApi) -> None:
    api.will_answer("I cannot talk about that.", finish_reason="content_filter")
    say(page, "something harmful")
    expect(page.locator(".causerie-notice.refused")).to_have_text("I cannot talk about that.")
    expect_idle(page)
    say(page, "something else")
    expect(answers(page).nth(1)).to_contain_text("fine")
    assert sent(api, 1) == [("user", "something else")]


def test_an_answer_whose_rest_is_withheld_keeps_its_words_and_is_not_sent_again(page: Page, api: ScriptedApi) -> None:
    api.will_answer("First, ", finish_reason="content_filter", refusal="The rest was withheld.")
    say(page, "something")
    expect(page.locator(".causerie-notice.refused")).to_have_text("The rest was withheld.")
    expect(answers(page)).to_contain_text("First,")
    expect_idle(page)
    say(page, "something else")
    expect(answers(page).nth(1)).to_contain_text("fine")
    assert sent(api, 1) == [("user", "something else")]


def test_a_busy_server_says_when_to_try_again(page: Page, api: ScriptedApi) -> None:
    api.will_refuse(429, "queue_full", "full", **{"Retry-After": "7"})
    say(page, "Hello")
    expect(page.locator(".causerie-notice.failed")).to_contain_text("try again in 7 s")


def test_an_engine_that_restarts_keeps_the_words_it_had_and_retry_works(page: Page, api: ScriptedApi) -> None:
    error = {"message": "the engine stopped", "code": "engine_stopped"}
    api.will_answer("half an ans", error=error)
    api.will_answer("a whole answer")
    say(page, "Hello")
    expect(answers(page)).to_contain_text("half an ans")
    expect(page.locator(".causerie-notice.failed")).to_contain_text("starting up again")
    expect_idle(page)
    retry(page)
    expect(answers(page)).to_contain_text("a whole answer")
    expect(page.locator(".causerie-notice")).to_have_count(0)


def test_preparation_is_shown_and_gives_way_to_the_chat(page: Page, site: Site, api: ScriptedApi) -> None:
    progress = {"stage": "Quantising layer 12 of 30", "done": 12, "total": 30}
    api.readiness = {"status": "not_ready", "waiting_for": "the model", "progress": progress}
    page.goto(site.url)
    expect(page.locator(".causerie-preparing")).to_contain_text("Quantising layer 12 of 30")
    expect(page.get_by_role("progressbar")).to_have_attribute("aria-valuenow", "40")
    expect(composer(page)).to_be_hidden()
    page.evaluate("window.sameDocument = true")
    progress["done"] = 24
    expect(page.get_by_role("progressbar")).to_have_attribute("aria-valuenow", "80")
    api.readiness = None
    expect(composer(page)).to_be_visible()
    expect(page.locator(".causerie-preparing")).to_be_hidden()
    expect(page.locator(".causerie-pill.ready")).to_have_text("scripted-135m")
    assert page.evaluate("window.sameDocument") is True
    say(page, "Hello")
    expect(answers(page)).to_contain_text("fine")


def test_an_answer_can_run_no_script_and_load_nothing(page: Page, api: ScriptedApi) -> None:
    for index, hostile in enumerate(HOSTILE):
        api.will_answer(f"before\n\n{hostile}\n\nafter {index}")
        say(page, hostile)
        expect(answers(page).nth(index)).to_contain_text(f"after {index}")
        expect_idle(page)
    live = page.locator(
        "#chatbot :is(.bot-row, .user-row) :is(script, iframe, style, img, object, embed, [onerror], [onload],"
        " [onmouseover], [href^='javascript' i])"
    )
    expect(live).to_have_count(0)
    for link in page.locator("#chatbot .message-content a").all():
        link.dispatch_event("click")
    assert page.evaluate("window.pwned") is None


def test_enter_sends_and_shift_enter_breaks_the_line(page: Page, api: ScriptedApi) -> None:
    composer(page).fill("one")
    composer(page).press("Shift+Enter")
    composer(page).type("two")
    expect(composer(page)).to_have_value("one\ntwo")
    composer(page).press("Enter")
    expect(answers(page)).to_contain_text("fine")
    assert sent(api, 0) == [("user", "one\ntwo")]


def test_a_blank_message_is_not_sent_and_a_bad_setting_loses_nothing(page: Page, api: ScriptedApi) -> None:
    say(page, "First")
    expect(answers(page)).to_contain_text("fine")
    expect_idle(page)
    say(page, "  ")
    page.locator("#settings > button").click()
    page.locator("#seed input, #seed textarea").fill("lucky")
    page.locator("#seed input, #seed textarea").blur()
    say(page, "Hello")
    expect(page.locator(".toast-body")).to_contain_text("The seed must be a whole number")
    expect(composer(page)).to_have_value("Hello")
    page.locator("#seed input, #seed textarea").fill("7")
    page.locator("#seed input, #seed textarea").blur()
    composer(page).press("Enter")
    expect(answers(page)).to_have_count(2)
    expect(prompts(page)).to_have_text(["First", "Hello"])
    assert [request.get("seed") for request in api.requests] == [None, 7]


def test_an_example_is_sent_when_chosen(page: Page, api: ScriptedApi) -> None:
    page.locator("#chatbot .example").first.click()
    expect(answers(page)).to_contain_text("fine")
    assert sent(api, 0) == [("user", "Explain photosynthesis to a ten-year-old")]


def test_the_key_that_opens_the_page_goes_to_the_api(browser: Browser) -> None:
    """Behind the gateway's own checks, where a browser sends the key as a password."""
    api, port = ScriptedApi(), free_port()
    checks = [HostCheck([]), OriginCheck([]), KeyCheck("secret")]
    api.app.add_middleware(AccessMiddleware, checks=checks)
    url = f"http://127.0.0.1:{port}"
    mount_page(api.app, api_base_url=url)
    with ServerThread(api.app, port):
        stranger = browser.new_context()
        response = stranger.request.get(url)
        assert response.status == 401
        assert response.headers["www-authenticate"].startswith("Basic")
        stranger.close()
        context = browser.new_context(http_credentials={"username": "", "password": "secret", "origin": url})
        page = context.new_page()
        page.goto(url)
        say(page, "Hello")
        expect(answers(page)).to_contain_text("fine")
        assert api.authorizations == ["Basic OnNlY3JldA=="]
        context.close()


def test_what_is_copied_is_what_was_said(browser: Browser, site: Site, watcher: Watcher) -> None:
    context = browser.new_context(permissions=["clipboard-read", "clipboard-write"])
    page = context.new_page()
    watcher.watch(page)
    page.goto(site.url)
    site.api.will_answer("if a <b then **c**")
    say(page, "Hello")
    expect(answers(page).locator(".causerie-stats")).to_be_visible()
    page.locator("#chatbot .message-buttons-left").get_by_label("Copy message").click()
    page.wait_for_function("navigator.clipboard.readText().then(text => text.length > 0)")
    assert page.evaluate("navigator.clipboard.readText()") == "if a <b then **c**"
    context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_the_chat_first_and_nothing_is_cut_off(
    browser: Browser, site: Site, watcher: Watcher, scheme: Any
) -> None:
    context = browser.new_context(viewport={"width": 375, "height": 740}, color_scheme=scheme)
    page = context.new_page()
    watcher.watch(page)
    page.goto(site.url)
    site.api.will_answer("```\n" + "x" * 300 + "\n```\n\n" + "y" * 300)
    say(page, "w" * 200)
    expect(answers(page)).to_contain_text("yyy")
    expect(page.locator("#sidebar")).not_to_have_class(re.compile(r"\bopen\b"))
    assert page.evaluate("document.documentElement.scrollWidth") <= 375
    assert page.evaluate("document.querySelector('#chatbot .bubble-wrap').scrollWidth") <= 375
    is_dark = page.evaluate("document.body.classList.contains('dark')")
    assert is_dark == (scheme == "dark")
    box = page.locator("#composer").bounding_box()
    assert box is not None
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 375
    context.close()
