"""One connection through the link proxy: the caller's end, the server's end, and a delay line each way between them.

    caller ── TCP ──► Endpoint ──► _Direction (delay line) ──► Endpoint ── unix socket ──► server
    caller ◄── TCP ── Endpoint ◄── (delay line) _Direction ◄── Endpoint ◄── unix socket ── server

* A half-close (FIN) travels like bytes; the other direction goes on. When both have ended, both ends close.
* A lost connection travels like bytes too, and resets the other end (closes it, if a unix socket: it knows no reset).
* A receiver that does not read fills its line, then the sender is not read any more (`queue_bytes_max`). A line that is
  held fills in the same way.
* When the pair's faults change, `Connection.change` asks `regions.link_rules.Call` again what to let through and
  whether the connection ends.
"""

from __future__ import annotations

import asyncio
import math
import socket
import struct
import time
from collections.abc import Callable
from typing import cast

from regions.link_line import DelayLine
from regions.link_rules import Call, Ending
from regions.link_toxics import End

__all__ = ["WRITE_BUFFER_BYTES_MAX", "Connection", "Endpoint"]

WRITE_BUFFER_BYTES_MAX = 1024 * 1024
"""What may wait in a transport for a receiver that does not read; beyond it, bytes wait in the delay line."""

_LINGER_0 = struct.pack("ii", 1, 0)  # close() then sends RST instead of FIN


def _call_at(due_s: float, callback: Callable[[], None]) -> asyncio.TimerHandle:
    """Call back at `due_s` (monotonic). Event loops count whole milliseconds: rounded up, so never too early."""
    wait_s = math.ceil((due_s - time.monotonic()) * 1000) / 1000
    return asyncio.get_running_loop().call_later(max(wait_s, 0.0), callback)


class _Direction:
    """One direction of one connection: from the source's transport through the delay line into the destination's."""

    def __init__(self, line: DelayLine, queue_bytes_max: int, on_end: Callable[[], None]) -> None:
        self._line = line
        self._queue_bytes_max = queue_bytes_max
        self._on_end = on_end
        self._source: asyncio.Transport | None = None
        self._destination: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._source_paused = False
        self._destination_full = False
        self._destination_lost = False
        self.ended = False  # the destination was told that nothing more comes

    def read_from(self, source: asyncio.Transport) -> None:
        self._source = source

    def write_to(self, destination: asyncio.Transport) -> None:
        self._destination = destination
        destination.set_write_buffer_limits(high=WRITE_BUFFER_BYTES_MAX)
        self._deliver()

    def push(self, sent: bytes | End) -> None:
        if not self._destination_lost:
            self._line.push(sent, time.monotonic())
            self._deliver()

    def change(self) -> None:
        """The line's faults have changed: what is due may be due at another time."""
        self._disarm()
        self._deliver()

    def lose_destination(self) -> None:
        self._destination_lost = True
        self._line.drop()
        self._disarm()
        self._throttle()

    def set_destination_full(self, full: bool) -> None:
        self._destination_full = full
        if not full:
            # Not at once: asyncio's transport, which is calling, must not be closed under its feet.
            asyncio.get_running_loop().call_soon(self._deliver)

    def _deliver(self) -> None:
        """Hand over what has arrived, and come back when the next is due."""
        destination = self._destination
        while destination is not None and not self._destination_full and not self._destination_lost:
            arrived = self._line.pop_due(time.monotonic())
            if arrived is None:
                self._arm()
                break
            if isinstance(arrived, End):
                self._end(destination, arrived)
            else:
                destination.write(arrived)
        self._throttle()

    def _end(self, destination: asyncio.Transport, how: End) -> None:
        self.ended = True
        if how is End.RESET:
            _reset(destination)
        elif not destination.is_closing():
            destination.write_eof()
        self._on_end()

    def _arm(self) -> None:
        if self._timer is None and (due_s := self._line.next_due_s) is not None:
            self._timer = _call_at(due_s, self._on_timer)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _on_timer(self) -> None:
        self._timer = None
        self._deliver()

    def _throttle(self) -> None:
        """Read the source only while not too much is under way."""
        source, held = self._source, self._line.held_bytes
        if source is None or source.is_closing():
            return
        if not self._source_paused and held > self._queue_bytes_max:
            self._source_paused = True
            source.pause_reading()
        elif self._source_paused and held <= self._queue_bytes_max // 2:
            self._source_paused = False
            source.resume_reading()


def _reset(transport: asyncio.Transport) -> None:
    """Close at once and drop what is unsent; a TCP peer sees a reset."""
    sock = transport.get_extra_info("socket")
    if sock is not None and sock.family == socket.AF_INET and not transport.is_closing():
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_0)
    transport.abort()


class Endpoint(asyncio.Protocol):
    """One end of a connection: what it receives goes `out`; `into` writes to it."""

    def __init__(
        self, out: _Direction, into: _Direction, on_eof: Callable[[], None], on_lost: Callable[[], None]
    ) -> None:
        self._out = out
        self._into = into
        self._on_eof = on_eof
        self._on_lost = on_lost
        self._received_eof = False
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self._out.read_from(self.transport)
        self._into.write_to(self.transport)

    def data_received(self, data: bytes) -> None:
        self._out.push(data)

    def eof_received(self) -> bool:
        self._received_eof = True
        self._out.push(End.EOF)
        self._on_eof()
        return True  # stay open for the other direction

    def pause_writing(self) -> None:
        self._into.set_destination_full(True)

    def resume_writing(self) -> None:
        self._into.set_destination_full(False)

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None  # closing a transport again after this is an error in asyncio
        if not (self._received_eof and self._into.ended):
            self._out.push(End.RESET)
        self._into.lose_destination()
        self._on_lost()


class Connection:
    """A caller's connection and the one to the server behind the address it called."""

    def __init__(self, call: Call, queue_bytes_max: int) -> None:
        self._call = call
        self._to_target = _Direction(call.to_target, queue_bytes_max, self._close_if_done)
        self._to_caller = _Direction(call.to_caller, queue_bytes_max, self._close_if_done)
        self.caller = Endpoint(self._to_target, self._to_caller, self._caller_sent_eof, self._caller_lost)
        self.server = Endpoint(self._to_caller, self._to_target, lambda: None, self._end_lost)
        self._ends_left = 2
        self._fate_timer: asyncio.TimerHandle | None = None
        self._ending = False
        self._silent = False
        self._changed = asyncio.Event()
        self.over = asyncio.Event()  # both ends are gone

    @property
    def silent(self) -> bool:
        """One of its ends is in an isolated region, or was."""
        return self._silent

    @property
    def ending(self) -> bool:
        """The link has ended it, or its caller gave up before it was connected."""
        return self._ending

    async def handshake(self) -> bool:
        """Wait until a handshake can go through; False if the connection has ended before."""
        self._meet_fate()
        while not self._ending and (self._silent or not self._call.connected):
            self._changed.clear()
            await self._changed.wait()
        return not self._ending

    def change(self) -> None:
        """The pair has changed."""
        if self._silent:
            return
        self._call.change(time.monotonic())
        self._meet_fate()
        self._to_target.change()
        self._to_caller.change()
        self._changed.set()

    def reset(self) -> None:
        """Reset both ends at once."""
        self._end_by_link(_reset)

    def silence(self) -> None:
        """Whatever is under way, and all that follows, vanishes; neither end learns anything until `reset`."""
        self._silent = True
        self._stop_fate()
        self._to_target.lose_destination()
        self._to_caller.lose_destination()

    def refuse(self) -> None:
        """There is no server: the caller learns it one lag later."""
        self.server.connection_lost(None)

    def abort(self) -> None:
        """Drop both ends at once."""
        self._stop_fate()
        for transport in self._transports():
            transport.abort()

    def _meet_fate(self) -> None:
        """End as the rules say, now or when the time comes."""
        self._stop_fate()
        fate = self._call.fate()
        if fate is None or self._ending or self._silent:
            return
        if fate.due_s > time.monotonic():
            self._fate_timer = _call_at(fate.due_s, self._meet_fate)
        elif fate.how is Ending.RESET:
            self.reset()
        else:
            self._end_by_link(lambda transport: transport.close())

    def _end_by_link(self, end: Callable[[asyncio.Transport], None]) -> None:
        self._ending = True
        for transport in self._transports():
            end(transport)
        self._to_target.lose_destination()
        self._to_caller.lose_destination()
        self._changed.set()

    def _stop_fate(self) -> None:
        if self._fate_timer is not None:
            self._fate_timer.cancel()
            self._fate_timer = None

    @property
    def _hangs(self) -> bool:
        """The server does not know it yet, and will not before something changes."""
        return not self._call.connected or (self._silent and self.server.transport is None)

    def _caller_sent_eof(self) -> None:
        if self._hangs:
            # Not at once: asyncio's transport, which is calling, must not be closed under its feet.
            asyncio.get_running_loop().call_soon(self.reset)

    def _caller_lost(self) -> None:
        if self._hangs:
            self._ending = True
            self._changed.set()
        self._end_lost()

    def _close_if_done(self) -> None:
        if self._to_target.ended and self._to_caller.ended:
            for transport in self._transports():
                transport.close()

    def _end_lost(self) -> None:
        self._ends_left -= 1
        if self._ends_left == 0:
            self.over.set()

    def _transports(self) -> list[asyncio.Transport]:
        return [end.transport for end in (self.caller, self.server) if end.transport is not None]
