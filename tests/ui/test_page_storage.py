"""Chats and settings live in the visitor's browser: what is kept there, when, and that nothing overwrites it."""

from __future__ import annotations

import pytest
from playwright.sync_api import Page, Route, expect

from tests.ui.chat_page import answers, expect_idle, prompts, say, sent
from tests.ui.conftest import Site
from tests.ui.scripted_api import WAIT_S, ScriptedApi

pytestmark = pytest.mark.system

TYPE_A_SEED_AS_SOON_AS_THERE_IS_A_FIELD = """() => new Promise((typed) => {
  new MutationObserver((_, observer) => {
    const field = document.querySelector("#seed input, #seed textarea");
    if (!field) return;
    observer.disconnect();
    field.value = "42";
    field.dispatchEvent(new Event("input", { bubbles: true }));
    setTimeout(typed, 500);
  }).observe(document.documentElement, { childList: true, subtree: true });
  document.querySelector("#settings > button").click();
})"""


def test_chats_survive_a_reload_and_can_be_opened_and_deleted(page: Page, api: ScriptedApi) -> None:
    chats = page.locator("#chat-list label")
    say(page, "First chat")
    expect(answers(page)).to_contain_text("fine")
    expect_idle(page)
    page.locator("#new-chat").click()
    expect(prompts(page)).to_have_count(0)
    say(page, "Second chat")
    expect(chats).to_have_text(["Second chat", "First chat"])
    expect_idle(page)
    page.reload()
    expect(chats).to_have_text(["Second chat", "First chat"])
    expect(prompts(page)).to_have_text("Second chat")
    chats.nth(1).click()
    expect(prompts(page)).to_have_text("First chat")
    say(page, "More")
    expect(prompts(page)).to_have_text(["First chat", "More"])
    expect_idle(page)
    assert sent(api, 2) == [("user", "First chat"), ("assistant", "fine"), ("user", "More")]
    page.once("dialog", lambda dialog: dialog.dismiss())
    page.locator("#delete-chat").click()
    expect(chats).to_have_count(2)
    page.once("dialog", lambda dialog: dialog.accept())
    page.locator("#delete-chat").click()
    expect(chats).to_have_text(["Second chat"])
    expect(prompts(page)).to_have_count(0)


def test_another_chat_is_not_overwritten_by_an_answer_still_running(page: Page, api: ScriptedApi) -> None:
    api.will_answer("one ", "two", is_gated=True)
    say(page, "First chat")
    api.release()
    expect(answers(page)).to_contain_text("one")
    page.locator("#new-chat").click()
    assert api.hung_up.wait(WAIT_S)
    expect(prompts(page)).to_have_count(0)
    expect_idle(page)
    page.locator("#chat-list label").click()
    expect(answers(page)).to_contain_text("one")
    expect(answers(page).locator(".causerie-stats")).to_contain_text("stopped")


def test_two_tabs_do_not_lose_each_others_chats(page: Page, api: ScriptedApi, site: Site) -> None:
    say(page, "First tab")
    expect(answers(page)).to_contain_text("fine")
    expect_idle(page)
    other = page.context.new_page()
    other.goto(site.url)
    other.locator("#new-chat").click()
    expect(prompts(other)).to_have_count(0)
    say(other, "Second tab")
    expect(answers(other)).to_contain_text("fine")
    expect_idle(other)
    with page.expect_event("load"):
        page.evaluate("window.dispatchEvent(new Event('focus'))")
    expect(page.locator("#chat-list label")).to_have_text(["Second tab", "First tab"])


def test_settings_are_folded_away_kept_and_sent(page: Page, api: ScriptedApi) -> None:
    expect(page.locator("#system-prompt")).to_be_hidden()
    page.locator("#settings > button").click()
    page.locator("#system-prompt textarea").fill("Be brief.")
    page.locator("#is-custom input").check()
    page.locator("#temperature input[type=number]").fill("0.2")
    page.locator("#seed input, #seed textarea").fill("42")
    page.locator("#seed input, #seed textarea").blur()
    say(page, "Hello")
    expect(answers(page)).to_contain_text("fine")
    expect_idle(page)
    request = api.requests[0]
    assert sent(api, 0) == [("system", "Be brief."), ("user", "Hello")]
    assert (request["temperature"], request["top_p"], request["seed"]) == (0.2, 0.9, 42)
    assert request["max_tokens"] == 1024
    page.reload()
    page.locator("#settings > button").click()
    expect(page.locator("#system-prompt textarea")).to_have_value("Be brief.")
    expect(page.locator("#temperature input[type=number]")).to_have_value("0.2")


def test_nothing_can_be_written_before_what_is_stored_is_back(page: Page) -> None:
    expect_idle(page)
    held: list[Route] = []
    page.route("**/queue/join*", lambda route: held.append(route), times=1)
    with page.expect_request("**/queue/join*"):
        page.reload()
    fields = ("#composer textarea", "#settings > button", "#new-chat", "#chat-list")
    for field in fields:
        expect(page.locator(field)).to_be_attached()
        expect(page.locator(field)).to_be_hidden()
    assert len(held) == 1
    held[0].continue_()
    for field in fields[:-1]:
        expect(page.locator(field)).to_be_visible()


def test_what_is_typed_the_moment_the_settings_unfold_is_kept(page: Page) -> None:
    expect_idle(page)
    expect(page.locator("#seed")).to_have_count(0)
    page.evaluate(TYPE_A_SEED_AS_SOON_AS_THERE_IS_A_FIELD)
    expect(page.locator("#seed input, #seed textarea")).to_have_value("42")
    page.wait_for_function("localStorage.getItem('causerie.settings') !== null")
    expect(page.locator("#seed input, #seed textarea")).to_have_value("42")


def test_without_own_settings_the_models_defaults_hold(page: Page, api: ScriptedApi) -> None:
    say(page, "Hello")
    expect(answers(page)).to_contain_text("fine")
    assert not {"temperature", "top_p", "seed"} & api.requests[0].keys()
