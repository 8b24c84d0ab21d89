"""The link proxy over real sockets. Lower bounds on time are exact; upper bounds only tell one lag from twenty."""

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
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from regions.errors import ExitCode, LinkFailed
from regions.link import Proxy
from regions.link_control import LinkControl
from regions.link_rules import link_config
from regions.topology import Topology
from tests.regions.link_lab import ADDRESS, LabFactory, Recorder, echo, event_loops, send_until_blocked, until, warmed

# Both event loops that the proxy may run under, or the one there is.
anyio_backend = event_loops


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


async def test_the_pair_of_regions_chooses_the_lag(lab: LabFactory) -> None:
    recorder = Recorder()
    # Any other link than c→a (and a→c for the handshake) would take more than half a minute.
    async with lab(recorder, {("c", "a"): 30, ("a", "c"): 30}, default_ms=10_000) as links:
        _, writer = await links.call("127.0.3.1")
        sent_at = time.monotonic()
        writer.write(b"x")
        await until(lambda: bool(recorder.arrivals), timeout_s=25)
    assert recorder.arrivals[0][0] - sent_at >= 0.030


async def test_inside_a_region_there_is_no_lag(lab: LabFactory) -> None:
    async with lab(echo, default_ms=10_000) as links:
        async with asyncio.timeout(25):
            await warmed(await links.call("127.0.1.9"))
        assert (await links.counters()).pair("a", "a").connections == 1


async def test_a_first_request_takes_two_round_trips(lab: LabFactory) -> None:
    async with lab(echo, {("b", "a"): 400, ("a", "b"): 600}) as links:
        started_at = time.monotonic()
        await warmed(await links.call("127.0.2.1"))
        assert 2 <= time.monotonic() - started_at < 20


async def test_a_hundred_messages_share_one_lag(lab: LabFactory) -> None:
    recorder = Recorder()
    async with lab(recorder, default_ms=600) as links:
        _, writer = await links.call("127.0.2.1")
        started_at = time.monotonic()
        for i in range(100):  # far enough apart that each is a chunk of its own
            writer.write(b"%03d" % i)
            await asyncio.sleep(0.001)
        await until(lambda: len(recorder.data) == 300)
    assert recorder.arrivals[-1][0] - started_at < 30  # a minute if one waited for the other
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
        async with asyncio.timeout(60):
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
        async with asyncio.timeout(60):
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
            await send_for(writer, seconds=60)


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
            async with asyncio.timeout(60):
                await reader.read(-1)
        assert (await links.counters()).refused == {"a": 1, "b": 0, "c": 0}


async def test_an_unbound_caller_is_served_without_lag_and_counted(lab: LabFactory) -> None:
    async with lab(echo, default_ms=10_000) as links:
        async with asyncio.timeout(25):
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
        async with httpx.AsyncClient(transport=transport, timeout=60) as client:
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
        assert process.wait(timeout=60) == ExitCode.OK
    finally:
        process.kill()
        process.communicate()


def test_the_process_names_what_is_wrong_with_its_configuration(run_dir: Path) -> None:
    (run_dir / "bad.json").write_text('{"listeners": 3}')
    process = start(run_dir / "bad.json")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (ExitCode.COULD_NOT_RUN, b"")
    assert err.startswith(b"error [link_failed]: link configuration: ")
    assert b"Traceback" not in err


def test_a_proxy_that_is_not_there_is_named(run_dir: Path) -> None:
    with pytest.raises(LinkFailed, match=r"nowhere\.sock did not answer GET /version"):
        LinkControl(run_dir / "nowhere.sock").ping()
