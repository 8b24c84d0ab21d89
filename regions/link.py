"""The link proxy: one process that owns every public address and carries bytes to the unix sockets behind, with lag.

    python -m regions.link CONFIG.json

The file is a `regions.link_rules.LinkConfig`. When every address is bound the process prints one line, `ready`. It
stops on SIGTERM or SIGINT. What a link does to bytes is decided in `regions.link_rules`; this file moves them:

    caller ── TCP ──► _Endpoint ──► _Direction (delay line) ──► _Endpoint ── unix socket ──► server
    caller ◄── TCP ── _Endpoint ◄── (delay line) _Direction ◄── _Endpoint ◄── unix socket ── server

* A half-close (FIN) travels like bytes; the other direction goes on. When both have ended, both ends close.
* A lost connection travels like bytes too, and resets the other end (closes it, if a unix socket: it knows no reset).
* A receiver that does not read fills its line, then the sender is not read any more (`queue_bytes_max`).
* A server that refuses (its socket is absent or closed) resets the caller.

The control socket takes one JSON object a line: `{"op": "ping"}`, `{"op": "counters"}`,
`{"op": "set_link", "from": A, "to": B, "one_way_ms": X}`, `{"op": "close", "to": R, "port": N, "on": true}`, or
`{"op": "isolate", "to": R, "on": true}` (`regions.link_gates`). It answers one a line: `{"ok": true, …}` or
`{"ok": false, "error": …}`.
"""

from __future__ import annotations

import asyncio
import math
import os
import resource
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any, cast

import msgspec

from regions.errors import ExitCode, LinkFailed, RegionsError
from regions.link_gates import Gates, Passage
from regions.link_rules import Call, DelayLine, End, LinkConfig, Listener, Network, OneWayMs

WRITE_BUFFER_BYTES_MAX = 1024 * 1024
"""What may wait in a transport for a receiver that does not read; beyond it, bytes wait in the delay line."""

OPEN_FILES_MAX = 65_536
"""Two descriptors a connection. macOS starts a process with a soft limit of 256."""

LISTEN_BACKLOG = 4096
"""1,500 verifiers may reconnect at once."""

CONTROL_LINE_BYTES_MAX = 64 * 1024

_LINGER_0 = struct.pack("ii", 1, 0)  # close() then sends RST instead of FIN


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

    def lose_destination(self) -> None:
        self._destination_lost = True
        self._line.drop()
        if self._timer is not None:
            self._timer.cancel()
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
        if self._timer is not None or (due_s := self._line.next_due_s) is None:
            return
        # Event loops count whole milliseconds: rounding up means never too early, and at most 1 ms late.
        wait_s = math.ceil((due_s - time.monotonic()) * 1000) / 1000
        self._timer = asyncio.get_running_loop().call_later(max(wait_s, 0.0), self._on_timer)

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


class _Endpoint(asyncio.Protocol):
    """One end of a connection: what it receives goes `out`; `into` writes to it."""

    def __init__(self, out: _Direction, into: _Direction, on_lost: Callable[[], None]) -> None:
        self._out = out
        self._into = into
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


class _Connection:
    """A caller's connection and the one to the server behind the address it called."""

    def __init__(self, call: Call, queue_bytes_max: int, ends: tuple[str, str, int] = ("", "", 0)) -> None:
        self.ends = ends  # the caller's region, the target's, and the port called
        self.silent = False
        handshake_done_s = time.monotonic() + call.round_trip_s
        first_arrival_s = handshake_done_s + call.to_target.one_way_s
        to_target = DelayLine(call.to_target, not_before_s=first_arrival_s)
        self._to_target = _Direction(to_target, queue_bytes_max, self._close_if_done)
        self._to_caller = _Direction(DelayLine(call.to_caller), queue_bytes_max, self._close_if_done)
        self.caller = _Endpoint(out=self._to_target, into=self._to_caller, on_lost=self._end_lost)
        self.server = _Endpoint(out=self._to_caller, into=self._to_target, on_lost=self._end_lost)
        self._ends_left = 2
        self.over = asyncio.Event()  # both ends are gone

    def refuse(self) -> None:
        """There is no server: the caller learns it one lag later."""
        self.server.connection_lost(None)

    def silence(self) -> None:
        """Whatever is under way, and all that follows, vanishes; neither end learns anything."""
        self.silent = True
        for direction in (self._to_target, self._to_caller):
            direction.lose_destination()

    def reset(self) -> None:
        """Both ends learn at once that the connection is gone."""
        for transport in self._transports():
            _reset(transport)
        self.over.set()

    def abort(self) -> None:
        """Drop both ends at once."""
        for transport in self._transports():
            transport.abort()

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


class _Caller(asyncio.Protocol):
    """Stands at a public address; hands a new connection on once it is known where it comes from."""

    def __init__(self, accept: Callable[[asyncio.Transport], None]) -> None:
        self._accept = accept

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._accept(cast(asyncio.Transport, transport))


class Proxy:
    """All public addresses and the control socket; `async with` binds and closes them.

    Entering raises `LinkFailed` naming the address that cannot be bound.
    """

    def __init__(self, config: LinkConfig) -> None:
        self._config = config
        self._network = Network(config)
        self._gates = Gates(config)
        self._connections: set[_Connection] = set()
        self._carrying: set[asyncio.Task[None]] = set()
        self._open = AsyncExitStack()

    async def __aenter__(self) -> Proxy:
        loop = asyncio.get_running_loop()
        async with AsyncExitStack() as opening:
            for listener in self._config.listeners:
                protocol = partial(_Caller, partial(self._accept, listener))
                try:
                    server = await loop.create_server(protocol, listener.address, listener.port, backlog=LISTEN_BACKLOG)
                except OSError as error:
                    raise LinkFailed(
                        f"cannot listen on {listener.address}:{listener.port}: {error.strerror}"
                    ) from error
                opening.callback(server.close)
            control = await asyncio.start_unix_server(
                self._serve_control, self._config.control, limit=CONTROL_LINE_BYTES_MAX
            )
            opening.callback(control.close)
            self._open = opening.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._open.aclose()
        for task in self._carrying:
            task.cancel()
        await asyncio.gather(*self._carrying, return_exceptions=True)

    def _accept(self, listener: Listener, transport: asyncio.Transport) -> None:
        peer = transport.get_extra_info("peername")
        if peer is None:  # gone before it was accepted
            transport.abort()
            return
        call = self._network.call(peer[0], listener.region)
        caller = self._network.region_of(peer[0]) or listener.region
        connection = _Connection(call, self._config.queue_bytes_max, (caller, listener.region, listener.port))
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        transport.set_protocol(connection.caller)
        connection.caller.connection_made(transport)
        task = asyncio.get_running_loop().create_task(self._carry(connection, listener))
        self._carrying.add(task)
        task.add_done_callback(self._carrying.discard)

    async def _carry(self, connection: _Connection, listener: Listener) -> None:
        """Call the server behind `listener`, and stay until the connection is over."""
        self._connections.add(connection)
        try:
            await self._dial(connection, listener)
            await connection.over.wait()
        finally:
            self._connections.discard(connection)
            connection.abort()

    async def _dial(self, connection: _Connection, listener: Listener) -> None:
        passage = self._gates.passage(*connection.ends)
        if passage is Passage.SILENT:
            connection.silence()
            return
        try:
            if passage is Passage.REFUSED:
                raise ConnectionRefusedError
            await asyncio.get_running_loop().create_unix_connection(lambda: connection.server, listener.uds)
        except OSError:
            self._network.refused[listener.region] += 1
            connection.refuse()

    def _enforce_gates(self) -> None:
        """Have every open connection meet the gates as they stand now."""
        for connection in list(self._connections):
            passage = self._gates.passage(*connection.ends)
            if passage is Passage.SILENT and not connection.silent:
                connection.silence()
            elif passage is Passage.REFUSED or (connection.silent and passage is Passage.OPEN):
                connection.reset()

    async def _serve_control(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, ValueError):  # the client is gone, or its line has no end
            while line := await reader.readline():
                reply = answer(self._network, line, self._gates)
                self._enforce_gates()
                writer.write(msgspec.json.encode(reply) + b"\n")
                await writer.drain()
        writer.close()


class _Request(msgspec.Struct, forbid_unknown_fields=True):
    op: str
    from_: str = msgspec.field(default="", name="from")
    to: str = ""
    one_way_ms: OneWayMs = 0.0
    port: int = 0
    on: bool = True


def answer(network: Network, line: bytes, gates: Gates) -> dict[str, Any]:
    """Carry out one line of the control protocol."""
    try:
        request = msgspec.json.decode(line, type=_Request)
        match request.op:
            case "ping":
                return {"ok": True}
            case "counters":
                return {"ok": True, **network.counters()}
            case "set_link":
                network.set_link(request.from_, request.to, request.one_way_ms)
                return {"ok": True}
            case "close":
                gates.set_closed(request.to, request.port, request.on)
                return {"ok": True}
            case "isolate":
                gates.set_isolated(request.to, request.on)
                return {"ok": True}
        known = "ping, counters, set_link, close, isolate"
        return {"ok": False, "error": f"unknown op {request.op!r}; there are: {known}"}
    except (msgspec.DecodeError, LinkFailed) as error:
        return {"ok": False, "error": str(error)}


async def serve(config: LinkConfig) -> None:
    """Run the proxy until SIGTERM or SIGINT. Raises `LinkFailed`."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with Proxy(config):
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        await stop.wait()


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop where it is installed."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


def _allow_many_connections() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES_MAX if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES_MAX)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def main(argv: list[str]) -> int:
    """Run the process; returns its exit code."""
    if len(argv) != 1:
        sys.stderr.write("usage: python -m regions.link CONFIG.json\n")
        return ExitCode.USAGE
    os.umask(0o077)  # the control socket is ours alone
    _allow_many_connections()
    try:
        config = LinkConfig.from_json(Path(argv[0]).read_bytes())
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            runner.run(serve(config))
    except OSError as error:
        sys.stderr.write(f"error [{LinkFailed.code}]: {error}\n")
        return LinkFailed.exit_code
    except RegionsError as error:
        sys.stderr.write(f"error [{error.code}]: {error}\n")
        return error.exit_code
    return ExitCode.OK


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
