"""The link proxy over real sockets. Lower bounds on time are exact; upper bounds only tell one lag from many."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from regions.errors import ExitCode, LinkFailed
from regions.link import Proxy, answer
from regions.link_control import LinkControl, LinkCounters
from regions.link_gates import Gates
from regions.link_rules import QUEUE_BYTES_MAX, LinkConfig, Network, link_config
from regions.topology import Topology

# Both event loops that the proxy may run under, or the one there is.
pytestmark = pytest.mark.anyio

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
Lags = dict[tuple[str, str], float]
Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]

ADDRESS = {"a": "127.0.1.1", "b": "127.0.2.1", "c": "127.0.3.1"}


@pytest.fixture(params=[False, True], ids=["asyncio", "uvloop"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, bool]]:
    if request.param:
        pytest.importorskip("uvloop")
    return ("asyncio", {"use_uvloop": request.param})


class Lab:
    """A proxy in this process with a server of region a behind it, and callers from anywhere."""

    def __init__(self, topology: Topology, control: Path) -> None:
        self.topology = topology
        self.control = control
        self.port = topology.ports["redis"]
        self._open: list[asyncio.StreamWriter] = []

    async def call(self, source: str | None, target: str = "a") -> Stream:
        local_addr = None if source is None else (source, 0)
        reader, writer = await asyncio.open_connection(ADDRESS[target], self.port, local_addr=local_addr)
        self._open.append(writer)
        return reader, writer

    async def counters(self) -> LinkCounters:
        return await asyncio.to_thread(LinkControl(self.control).counters)

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
        config = link_config(topology, {("a", "redis"): uds}, control, queue_bytes_max=queue)
        lab = Lab(topology, control)
        try:
            async with Proxy(config):
                yield lab
        finally:
            await lab.close()
            server.close()
            await asyncio.gather(*(writer.wait_closed() for writer in served), return_exceptions=True)


@pytest.fixture
def lab(run_dir: Path, topology_with: Callable[..., Topology]) -> LabFactory:
    return LabFactory(run_dir, topology_with)


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


async def until(condition: Callable[[], bool], *, timeout_s: float = 20) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - what is waited for happens in code that knows nothing of the test
            await asyncio.sleep(0.005)


async def warmed(stream: Stream) -> Stream:
    """Past the handshake, with an echoing server: from here on only the lag counts."""
    reader, writer = stream
    writer.write(b"!")
    assert await reader.readexactly(1) == b"!"
    return stream


async def test_each_direction_takes_its_own_lag(lab: LabFactory) -> None:
    answered_at = 0.0

    async def note_and_echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal answered_at
        while data := await reader.read(100):
            answered_at = time.monotonic()
            writer.write(data)

    async with lab(note_and_echo, {("b", "a"): 50, ("a", "b"): 150}) as links:
        reader, writer = await warmed(await links.call("127.0.2.1"))
        sent_at = time.monotonic()
        writer.write(b"x")
        await reader.readexactly(1)
        back_at = time.monotonic()
    assert answered_at - sent_at >= 0.050
    assert back_at - answered_at >= 0.150
    assert back_at - sent_at < 2


async def test_the_pair_of_regions_chooses_the_lag(lab: LabFactory) -> None:
    recorder = Recorder()
    # Any other link than c→a (and a→c for the handshake) would take ten seconds.
    async with lab(recorder, {("c", "a"): 30, ("a", "c"): 30}, default_ms=10_000) as links:
        _, writer = await links.call("127.0.3.1")
        sent_at = time.monotonic()
        writer.write(b"x")
        await until(lambda: bool(recorder.arrivals), timeout_s=5)
    assert recorder.arrivals[0][0] - sent_at >= 0.030


async def test_inside_a_region_there_is_no_lag(lab: LabFactory) -> None:
    async with lab(echo, default_ms=10_000) as links:
        async with asyncio.timeout(5):
            await warmed(await links.call("127.0.1.9"))
        assert (await links.counters()).pair("a", "a").connections == 1


async def test_a_first_request_takes_two_round_trips(lab: LabFactory) -> None:
    async with lab(echo, {("b", "a"): 40, ("a", "b"): 60}) as links:
        started_at = time.monotonic()
        await warmed(await links.call("127.0.2.1"))
        assert 0.2 <= time.monotonic() - started_at < 2


async def test_a_hundred_messages_share_one_lag(lab: LabFactory) -> None:
    recorder = Recorder()
    async with lab(recorder, default_ms=40) as links:
        _, writer = await links.call("127.0.2.1")
        started_at = time.monotonic()
        for i in range(100):  # far enough apart that each is a chunk of its own
            writer.write(b"%03d" % i)
            await asyncio.sleep(0.001)
        await until(lambda: len(recorder.data) == 300)
    assert recorder.arrivals[-1][0] - started_at < 2  # 4 s if one waited for the other
    assert recorder.data == b"".join(b"%03d" % i for i in range(100))


async def test_nothing_arrives_early(lab: LabFactory) -> None:
    recorder = Recorder()
    async with lab(recorder, default_ms=25) as links:
        _, writer = await links.call("127.0.2.1")
        sent_at = []
        for _ in range(200):
            sent_at.append(time.monotonic())
            writer.write(b"x")
            await asyncio.sleep(0.0007)
        await until(lambda: len(recorder.data) == 200)
    arrived_at = [at for at, data in recorder.arrivals for _ in data]
    assert all(arrived - sent >= 0.025 for sent, arrived in zip(sent_at, arrived_at, strict=True))


async def test_a_big_transfer_arrives_intact_in_both_directions(lab: LabFactory) -> None:
    payload = os.urandom(16 * 1024 * 1024)
    async with lab(echo, default_ms=20) as links:
        reader, writer = await links.call("127.0.2.1")

        async def send() -> None:
            writer.write(payload)
            await writer.drain()
            writer.write_eof()

        sending = asyncio.create_task(send())
        received = await reader.read(-1)
        await sending
        counters = await links.counters()
    assert hashlib.sha256(received).digest() == hashlib.sha256(payload).digest()
    assert counters.pair("b", "a").bytes == counters.pair("a", "b").bytes == len(payload)


async def test_a_half_close_leaves_the_other_direction_open(lab: LabFactory) -> None:
    async def answer_after_eof(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = await reader.read(-1)
        writer.write(request.upper())
        await writer.drain()

    async with lab(answer_after_eof, default_ms=20) as links:
        reader, writer = await links.call("127.0.2.1")
        writer.write(b"hello")
        writer.write_eof()
        assert await reader.read(-1) == b"HELLO"


async def test_a_slow_reader_gets_the_last_bytes_though_both_sides_have_ended(lab: LabFactory) -> None:
    payload = os.urandom(8 * 1024 * 1024)

    async def send_and_close(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(-1)
        writer.write(payload)
        await writer.drain()

    async with lab(send_and_close, default_ms=5) as links:
        with socket.create_connection((ADDRESS["a"], links.port), source_address=("127.0.2.1", 0)) as sock:
            sock.shutdown(socket.SHUT_WR)
            sock.setblocking(False)
            received = bytearray()
            while data := await asyncio.get_running_loop().sock_recv(sock, 65_536):
                received += data
                await asyncio.sleep(0.001)
    assert received == payload


async def test_a_server_that_closes_ends_the_connection_after_its_last_bytes(lab: LabFactory) -> None:
    async def goodbye(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"goodbye")

    async with lab(goodbye, default_ms=20) as links:
        reader, _ = await links.call("127.0.2.1")
        async with asyncio.timeout(10):
            assert await reader.read(-1) == b"goodbye"


async def test_a_caller_that_resets_ends_the_servers_connection_one_lag_later(lab: LabFactory) -> None:
    recorder = Recorder()
    async with lab(recorder, default_ms=50) as links:
        sock = socket.create_connection((ADDRESS["a"], links.port), source_address=("127.0.2.1", 0))
        sock.sendall(b"x")
        await until(lambda: recorder.data == b"x")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        reset_at = time.monotonic()
        sock.close()
        async with asyncio.timeout(10):
            await recorder.ended.wait()
        assert time.monotonic() - reset_at >= 0.050


async def test_a_server_that_dies_resets_a_caller_who_goes_on_sending(lab: LabFactory) -> None:
    async def die(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(1)
        writer.transport.abort()

    async with lab(die, default_ms=10) as links:
        reader, writer = await links.call("127.0.2.1")
        writer.write(b"x")
        assert await reader.read(-1) == b""
        with pytest.raises(ConnectionError):
            await send_for(writer, seconds=10)


async def send_for(writer: asyncio.StreamWriter, seconds: float) -> None:
    async with asyncio.timeout(seconds):
        while True:
            writer.write(b"more")
            await writer.drain()
            await asyncio.sleep(0.005)


async def test_a_server_that_is_not_there_resets_the_caller_and_is_counted(lab: LabFactory) -> None:
    async with lab(echo, default_ms=20) as links:
        links.control.with_name("server.sock").unlink()
        reader, _ = await links.call("127.0.2.1")
        with pytest.raises(ConnectionResetError):
            async with asyncio.timeout(10):
                await reader.read(-1)
        assert (await links.counters()).refused == {"a": 1, "b": 0, "c": 0}


async def test_an_unbound_caller_is_served_without_lag_and_counted(lab: LabFactory) -> None:
    async with lab(echo, default_ms=10_000) as links:
        async with asyncio.timeout(5):
            await warmed(await links.call(None))
        counters = await links.counters()
    assert counters.unbound == {"a": 1, "b": 0, "c": 0}
    assert all(pair.connections == 0 for pair in counters.pairs if pair.from_ != pair.to)


async def test_a_bound_caller_is_not_counted_as_unbound(lab: LabFactory) -> None:
    async with lab(echo) as links:
        await warmed(await links.call("127.0.2.1"))
        counters = await links.counters()
    assert counters.unbound == {"a": 0, "b": 0, "c": 0}
    assert [(pair.from_, pair.to) for pair in counters.pairs if pair.connections] == [("b", "a")]


async def test_an_httpx_client_with_a_local_address_is_seen_in_its_region(lab: LabFactory) -> None:
    async def http(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n")

    async with lab(http) as links:
        transport = httpx.AsyncHTTPTransport(local_address="127.0.3.1")
        async with httpx.AsyncClient(transport=transport) as client:
            assert (await client.get(f"http://{ADDRESS['a']}:{links.port}/")).status_code == 204
        counters = await links.counters()
    assert counters.pair("c", "a").connections == 1
    assert counters.unbound["a"] == 0


async def test_a_receiver_that_does_not_read_slows_its_sender_and_loses_nothing(lab: LabFactory) -> None:
    reading = asyncio.Event()
    received = 0

    async def read_when_told(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        nonlocal received
        await reading.wait()
        while data := await reader.read(65_536):
            received += len(data)

    total = 64 * 1024 * 1024
    async with lab(read_when_told, default_ms=10, queue=1024 * 1024) as links:
        with socket.create_connection((ADDRESS["a"], links.port), source_address=("127.0.2.1", 0)) as sock:
            sock.setblocking(False)
            accepted = await send_until_blocked(sock, total)
            assert accepted < total // 2  # the kernel's buffers and the queue, not the whole
            reading.set()
            await asyncio.get_running_loop().sock_sendall(sock, bytes(total - accepted))
            sock.shutdown(socket.SHUT_WR)
            await until(lambda: received == total, timeout_s=60)


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


async def test_a_changed_lag_holds_at_once_for_open_connections(lab: LabFactory) -> None:
    async with lab(echo, default_ms=1) as links:
        reader, writer = await warmed(await links.call("127.0.2.1"))
        await asyncio.to_thread(LinkControl(links.control).set_link, "b", "a", 200)
        sent_at = time.monotonic()
        writer.write(b"x")
        await reader.readexactly(1)
        assert time.monotonic() - sent_at >= 0.2
        assert (await links.counters()).pair("b", "a").one_way_ms == 200
        assert (await links.counters()).pair("a", "b").one_way_ms == 1


async def test_one_control_connection_answers_many_requests(lab: LabFactory) -> None:
    async with lab(echo) as links:

        def ask() -> None:
            with socket.socket(socket.AF_UNIX) as sock, sock.makefile("rb") as replies:
                sock.connect(str(links.control))
                sock.sendall(b'{"op": "ping"}\n{"op": "nonsense"}\n')
                assert json.loads(replies.readline()) == {"ok": True}
                assert json.loads(replies.readline())["ok"] is False
                sock.sendall(b'{"op": "counters"}\n')
                assert json.loads(replies.readline())["ok"] is True

        await asyncio.to_thread(ask)


@pytest.mark.parametrize(
    ("line", "error"),
    [
        (b"nonsense", "malformed"),
        (b'{"op": "explode"}', "explode"),
        (b'{"op": "set_link", "from": "a", "to": "b", "one_way_ms": -1}', "one_way_ms"),
        (b'{"op": "set_link", "from": "a", "to": "mars", "one_way_ms": 1}', "mars"),
        (b'{"op": "ping", "colour": 1}', "colour"),
        (b'{"op": "close", "to": "a", "port": 1}', "nothing listens"),
        (b'{"op": "isolate", "to": "mars"}', "mars"),
    ],
)
async def test_a_wrong_control_request_is_answered_with_what_is_wrong(line: bytes, error: str) -> None:
    config = LinkConfig(listeners=[], regions={"a": "127.0.1.", "b": "127.0.2."}, links=[], control="")
    reply = answer(Network(config), line, Gates(config))
    assert reply["ok"] is False
    assert error in reply["error"]


async def test_an_address_in_use_is_refused_by_name_and_nothing_stays_bound(
    run_dir: Path, topology_with: Callable[..., Topology]
) -> None:
    topology = topology_with({})
    port = topology.ports["redis"]
    both = {("a", "redis"): run_dir / "s", ("b", "redis"): run_dir / "s"}
    with socket.create_server((ADDRESS["b"], port)), pytest.raises(LinkFailed, match=f"{ADDRESS['b']}:{port}"):
        async with Proxy(link_config(topology, both, run_dir / "control")):
            pass
    await asyncio.sleep(0)
    socket.create_server((ADDRESS["a"], port)).close()


# The process


@pytest.fixture
def config_file(run_dir: Path, topology_with: Callable[..., Topology]) -> Path:
    path = run_dir / "link.json"
    uds_of = {("a", "redis"): run_dir / "absent.sock"}
    path.write_bytes(link_config(topology_with({}), uds_of, run_dir / "control.sock").to_json())
    return path


def start(path: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "regions.link", str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_process_says_ready_once_it_listens_and_stops_on_a_signal(config_file: Path, number: int) -> None:
    process = start(config_file)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        LinkControl(config_file.with_name("control.sock")).ping()
        assert config_file.with_name("control.sock").stat().st_mode & 0o077 == 0
        listener = json.loads(config_file.read_bytes())["listeners"][0]
        socket.create_connection((listener["address"], listener["port"])).close()
        process.send_signal(number)
        assert process.wait(timeout=20) == ExitCode.OK
    finally:
        process.kill()
        process.communicate()


def test_the_process_names_what_is_wrong_with_its_configuration(run_dir: Path) -> None:
    (run_dir / "bad.json").write_text('{"listeners": 3}')
    process = start(run_dir / "bad.json")
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (ExitCode.COULD_NOT_RUN, b"")
    assert err.startswith(b"error [link_failed]: link configuration: ")
    assert b"Traceback" not in err


def test_a_proxy_that_is_not_there_is_named(run_dir: Path) -> None:
    with pytest.raises(LinkFailed, match=r"nowhere\.sock did not answer ping"):
        LinkControl(run_dir / "nowhere.sock").ping()
