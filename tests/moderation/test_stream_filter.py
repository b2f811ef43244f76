from __future__ import annotations

import pytest

from moderation.stream_filter import PassThrough, Release, StreamFilter

pytestmark = pytest.mark.unit


def test_pass_through_releases_every_piece_at_once_and_owes_nothing() -> None:
    stream: StreamFilter = PassThrough()

    assert [stream.feed(piece) for piece in ("a", "", "bc")] == [Release("a"), Release(""), Release("bc")]
    assert stream.finish() == Release("", is_stopped=False)
