"""Server-sent events: whatever the chunks, the same events; limits in pairs."""

from __future__ import annotations

import pytest

from verifier.sse import Event, EventParser, EventTooLong

STREAM = (
    b": hello\n\nevent: a\nid: 1\ndata: one\n\r\ndata:two\r\ndata:  three\r\n\r\n"
    b"event: nothing\n\nretry: 5\ndata\n\nevent: rest\ndata: cut off"
)
EVENTS = [Event("a", b"one", "1"), Event("message", b"two\n three", None), Event("message", b"", None)]


def test_events_are_what_their_lines_say() -> None:
    assert EventParser(100).feed(STREAM) == EVENTS


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64])
def test_chunks_may_end_anywhere(size: int) -> None:
    parser = EventParser(100)
    found = [event for at in range(0, len(STREAM), size) for event in parser.feed(STREAM[at : at + size])]
    assert found == EVENTS


@pytest.mark.parametrize("end", [b"\n\n", b""])
def test_a_line_may_be_as_long_as_the_limit_and_no_longer(end: bytes) -> None:
    longest = b"data: " + b"x" * 94
    EventParser(100).feed(longest + end)
    with pytest.raises(EventTooLong):
        EventParser(100).feed(longest + b"x" + end)


def test_the_lines_of_an_event_together_are_bounded_too() -> None:
    line = b"data: " + b"x" * 49 + b"\n"
    assert len(EventParser(99).feed(line * 2 + b"\n")[0].data) == 99
    with pytest.raises(EventTooLong):
        EventParser(98).feed(line * 2 + b"\n")


def test_text_that_is_not_utf8_is_an_error() -> None:
    with pytest.raises(UnicodeDecodeError):
        EventParser(100).feed(b"event: \xff\n")
