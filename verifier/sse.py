"""Server-sent events, as bytes come in. Pure. (WHATWG HTML, section 9.2.6, with LF or CRLF at the end of lines.)

A line or an event that is longer than the limit is an error, and so is text that is not UTF-8: whoever speaks so is not
the server that was asked for.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["Event", "EventParser", "EventTooLong"]


class EventTooLong(ValueError):
    """A line or an event's data is longer than the limit."""


class Event(NamedTuple):
    """One event; comments and fields of no meaning here are left out."""

    name: str
    data: bytes
    id: str | None


class EventParser:
    """Turns chunks of a body into events. ``bytes_max`` bounds a line, and the data of one event."""

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._held = bytearray()
        self._name = "message"
        self._id: str | None = None
        self._data: list[bytes] = []
        self._size = 0

    def feed(self, chunk: bytes) -> list[Event]:
        """The events that this chunk completes; raises :class:`EventTooLong` and :class:`UnicodeDecodeError`."""
        *lines, rest = (bytes(self._held) + chunk).split(b"\n") if b"\n" in chunk else (self._held + chunk,)
        self._held = bytearray(rest)
        if len(self._held) > self._bytes_max:
            raise EventTooLong
        return [event for line in lines if (event := self._line(line.removesuffix(b"\r"))) is not None]

    def _line(self, line: bytes) -> Event | None:
        if len(line) > self._bytes_max:
            raise EventTooLong
        if not line:
            return self._dispatch()
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if name == b"data":
            self._data.append(value)
            self._size += len(value) + 1
            if self._size > self._bytes_max + 1:
                raise EventTooLong
        elif name == b"event":
            self._name = value.decode()
        elif name == b"id":
            self._id = value.decode()
        return None

    def _dispatch(self) -> Event | None:
        event = Event(self._name, b"\n".join(self._data), self._id) if self._data else None
        self._name, self._id, self._data, self._size = "message", None, [], 0
        return event
