"""One choice of an answer behind its filter."""

from __future__ import annotations

import pytest

from moderation.stream_filter import PassThrough, Release
from serving.engine.requests import FinishReason, GenerateRequest, SamplingParams, TokenEvent
from serving.gateway.choices import Choice, ChoiceDelta
from tests.serving.gateway.fakes import token

pytestmark = pytest.mark.unit


class HoldingFilter(PassThrough):
    """Holds the last piece back; stops at "stop"."""

    def __init__(self) -> None:
        super().__init__()
        self._held = ""

    def feed(self, text: str) -> None:
        self.is_stopped = self.is_stopped or "stop" in text
        super().feed(self._held)
        self._held = text

    def end(self) -> None:
        super().feed(self._held)
        super().end()

    def take(self) -> Release:
        released = super().take()
        return Release(released.text, self.is_stopped, released.is_complete and not self.is_stopped)


def test_only_what_the_filter_releases_leaves() -> None:
    choice = Choice(0, HoldingFilter(), None, "withheld")
    assert fed(choice, piece("a")) is None
    assert fed(choice, piece("b")) == ChoiceDelta(0, "a", [])
    assert fed(choice, piece("c", finish="length")) == ChoiceDelta(0, "bc", [], "length")
    assert choice.text == "abc"


def test_a_filter_that_stops_ends_the_choice() -> None:
    choice = Choice(0, HoldingFilter(), None, "withheld")
    fed(choice, piece("a"))
    assert fed(choice, piece("stop"), piece("b")) == ChoiceDelta(0, "a", [], "content_filter", "withheld")
    assert fed(choice, token(say_nothing(), "more", finish="stop")) is None
    assert (choice.text, choice.token_ids) == ("a", [])


def say_nothing() -> GenerateRequest:
    return GenerateRequest(request_id="id", prompt_ids=[1], sampling=SamplingParams(max_tokens=1, seed=1))


def fed(choice: Choice, *events: TokenEvent) -> ChoiceDelta | None:
    choice.feed(events)
    return choice.take()


def piece(text: str, finish: FinishReason | None = None) -> TokenEvent:
    return TokenEvent(request_id="id", choice_index=0, token_ids=[], text=text, finish_reason=finish)
