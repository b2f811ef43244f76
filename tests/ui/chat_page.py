"""What a visitor does and sees on the chat page, by the names of its parts."""

from __future__ import annotations

from typing import Any

from playwright.sync_api import Page, expect

from tests.ui.scripted_api import ScriptedApi


def composer(page: Page) -> Any:
    return page.locator("#composer textarea")


def say(page: Page, text: str) -> None:
    composer(page).fill(text)
    composer(page).press("Enter")


def prompts(page: Page) -> Any:
    return page.locator('#chatbot [data-testid="user"]')


def answers(page: Page) -> Any:
    return page.locator("#chatbot .bot-row")


def stop_button(page: Page) -> Any:
    return page.get_by_role("button", name="Stop", exact=True)


def retry(page: Page) -> None:
    page.locator("#chatbot .message-buttons").get_by_label("Retry", exact=True).click()


def expect_idle(page: Page) -> None:
    expect(page.get_by_role("button", name="Send", exact=True)).to_be_visible()


def sent(api: ScriptedApi, index: int) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in api.requests[index]["messages"]]
