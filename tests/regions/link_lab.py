"""A link proxy in the test's process, with one server behind the addresses of regions a and b."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from regions.link import Proxy
from regions.link_control import LinkControl, LinkCounters
from regions.link_rules import QUEUE_BYTES_MAX, link_config
from regions.topology import Topology

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
Lags = dict[tuple[str, str], float]
Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]

ADDRESS = {"a": "127.0.1.1", "b": "127.0.2.1", "c": "127.0.3.1"}


class Lab:
    """A proxy in this process with a server behind it, and callers from anywhere."""

    def __init__(self, topology: Topology, control: Path) -> None:
        self.topology = topology
        self.control = control
        self.link = LinkControl(control)
        self.port = topology.ports["redis"]
        self._open: list[asyncio.StreamWriter] = []

    async def call(self, source: str | None, target: str = "a") -> Stream:
        local_addr = None if source is None else (source, 0)
        reader, writer = await asyncio.open_connection(ADDRESS[target], self.port, local_addr=local_addr)
        self._open.append(writer)
        return reader, writer

    async def counters(self) -> LinkCounters:
        return await asyncio.to_thread(self.link.counters)

    async def close(self) -> None:
        for writer in self._open:
            writer.close()
        await asyncio.gather(*(writer.wait_closed() for writer in self._open), return_exceptions=True)


class LabFactory:
    def __init__(self, run_dir: Path, topology_with: Callable[..., Topology]) -> None:
        self._run_dir = run_dir
        self._topology_with = topology_with

    @asynccontextmanager
    async def __call__(
        self, handler: Handler, lags: Lags | None = None, *, default_ms: float = 0, queue: int = QUEUE_BYTES_MAX
    ) -> AsyncIterator[Lab]:
        topology = self._topology_with(lags or {}, default_ms=default_ms)
        uds, control = self._run_dir / "server.sock", self._run_dir / "control.sock"
        served: list[asyncio.StreamWriter] = []

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            served.append(writer)
            try:
                await handler(reader, writer)
            except ConnectionError:
                pass
            finally:
                writer.close()

        server = await asyncio.start_unix_server(serve, uds)
        uds_of = {(region, "redis"): uds for region in ("a", "b")}
        config = link_config(topology, uds_of, control, queue_bytes_max=queue)
        lab = Lab(topology, control)
        try:
            async with Proxy(config):
                yield lab
        finally:
            await lab.close()
            server.close()
            await asyncio.gather(*(writer.wait_closed() for writer in served), return_exceptions=True)


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65_536):
        writer.write(data)
        await writer.drain()


class Recorder:
    """A server that notes what came and when, and how the connection ended."""

    def __init__(self) -> None:
        self.arrivals: list[tuple[float, bytes]] = []
        self.ended = asyncio.Event()

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65_536):
                self.arrivals.append((time.monotonic(), data))
        finally:
            self.ended.set()

    @property
    def data(self) -> bytes:
        return b"".join(data for _, data in self.arrivals)


async def until(condition: Callable[[], bool], *, timeout_s: float = 60) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - what is waited for happens in code that knows nothing of the test
            await asyncio.sleep(0.005)


async def warmed(stream: Stream) -> Stream:
    """Past the handshake, with an echoing server: from here on only the lag counts."""
    reader, writer = stream
    writer.write(b"!")
    assert await reader.readexactly(1) == b"!"
    return stream


async def send_until_blocked(sock: socket.socket, total: int) -> int:
    """Send until nothing has been accepted for half a second; returns how much was."""
    accepted, idle = 0, 0
    while idle < 50 and accepted < total:
        try:
            accepted += sock.send(bytes(min(65_536, total - accepted)))
            idle = 0
        except BlockingIOError:
            idle += 1
        await asyncio.sleep(0.01 if idle else 0)
    return accepted


@pytest.fixture(params=[False, True], ids=["asyncio", "uvloop"])
def event_loops(request: pytest.FixtureRequest) -> tuple[str, dict[str, bool]]:
    """Both event loops that the proxy may run under, or the one there is: `anyio_backend = event_loops`."""
    if request.param:
        pytest.importorskip("uvloop")
    return ("asyncio", {"use_uvloop": request.param})
