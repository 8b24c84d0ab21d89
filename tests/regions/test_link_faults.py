"""Every fault of the link proxy over real sockets, on open and on new connections, in each direction, and healed.

Lower bounds on time are exact. Where nothing may arrive, a round trip over another pair of regions, begun afterwards,
has come back: longer than what is waited for would have taken.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import socket
import time
from asyncio import to_thread
from collections.abc import Callable

import pytest

from regions.errors import LinkRefused
from regions.link_control import LinkControl
from tests.regions.link_lab import (
    ADDRESS,
    Lab,
    LabFactory,
    Recorder,
    Stream,
    echo,
    event_loops,
    send_until_blocked,
    until,
    warmed,
)

anyio_backend = event_loops

A, B, C = "127.0.1.1", "127.0.2.1", "127.0.3.1"


class Server:
    """Notes what came and when; sends what it is told, to whoever called last."""

    def __init__(self) -> None:
        self.calls = 0
        self.ended = 0
        self.arrivals: list[tuple[float, bytes]] = []
        self._writer: asyncio.StreamWriter | None = None

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.calls += 1
        self._writer = writer
        try:
            while data := await reader.read(65_536):
                self.arrivals.append((time.monotonic(), data))
                if data == b"ping":
                    writer.write(b"pong")
        finally:
            self.ended += 1

    @property
    def data(self) -> bytes:
        return b"".join(data for _, data in self.arrivals if data != b"ping")

    def send(self, data: bytes) -> None:
        assert self._writer is not None
        self._writer.write(data)


async def opened(links: Lab, server: Server, source: str = B, target: str = "a") -> Stream:
    """An open connection past its handshake, the last that the server knows."""
    reader, writer = await links.call(source, target)
    writer.write(b"ping")
    assert await reader.readexactly(4) == b"pong"
    return reader, writer


async def elsewhere(links: Lab) -> None:
    """A round trip from c to a and back on a new connection."""
    reader, writer = await links.call(C)
    writer.write(b"ping")
    async with asyncio.timeout(60):
        assert await reader.readexactly(4) == b"pong"


async def is_reset(reader: asyncio.StreamReader) -> bool:
    try:
        async with asyncio.timeout(60):
            await reader.read(-1)
    except ConnectionResetError:
        return True
    return False


async def opened_in_time(links: Lab, server: Server) -> tuple[float, asyncio.StreamReader]:
    """A connection that was answered before its time was over, and when it was begun: a slow machine tries again."""
    async with asyncio.timeout(60):
        while True:
            began_at = time.monotonic()
            try:
                reader, _ = await opened(links, server)
            except (ConnectionError, asyncio.IncompleteReadError):
                continue
            return began_at, reader


def nothing_came(reader: asyncio.StreamReader) -> bool:
    return not reader.at_eof() and reader.exception() is None and not reader._buffer  # type: ignore[attr-defined]


# latency and jitter


async def test_latency_is_added_in_its_direction_alone(lab: LabFactory) -> None:
    server = Server()
    async with lab(server, default_ms=10) as links:
        reader, writer = await opened(links, server)
        await to_thread(links.link.latency, "b", "a", 150)
        sent_at = time.monotonic()
        writer.write(b"x")
        await until(lambda: server.data == b"x")
        assert server.arrivals[-1][0] - sent_at >= 0.160
        server.send(b"y")
        assert await reader.readexactly(1) == b"y"
        state = (await to_thread(links.link.proxies))["a:b"]
        # The way b→a is also what comes back to callers from a.
        assert [(toxic.name, toxic.attributes["latency"]) for toxic in state.toxics] == [("latency_downstream", 150)]


async def test_latency_holds_for_a_connection_that_the_other_side_opened(lab: LabFactory) -> None:
    server = Server()
    async with lab(server) as links:
        await to_thread(links.link.latency, "b", "a", 150)
        started_at = time.monotonic()
        await opened(links, server, A, "b")  # SYN-ACK and answer
        assert time.monotonic() - started_at >= 0.300


async def test_jitter_keeps_the_order(lab: LabFactory) -> None:
    recorder = Recorder()
    async with lab(recorder) as links:
        await to_thread(links.link.jitter, "b", "a", 30)
        _, writer = await links.call(B)
        sent_at = []
        for i in range(100):
            sent_at.append(time.monotonic())
            writer.write(b"%03d" % i)
            await asyncio.sleep(0.001)
        await until(lambda: len(recorder.data) == 300)
    assert recorder.data == b"".join(b"%03d" % i for i in range(100))


# bandwidth and slicer


@pytest.mark.parametrize("upstream", [True, False])
async def test_bandwidth_limits_its_direction(lab: LabFactory, upstream: bool) -> None:
    server = Server()
    async with lab(server) as links:
        reader, writer = await opened(links, server)
        await to_thread(links.link.bandwidth, *(("b", "a") if upstream else ("a", "b")), 100)
        sent_at = time.monotonic()
        if upstream:
            writer.write(bytes(40_000))
            await until(lambda: len(server.data) == 40_000)
        else:
            server.send(bytes(40_000))
            await reader.readexactly(40_000)
        assert time.monotonic() - sent_at >= 0.4


async def test_lifting_a_starved_link_lets_the_rest_through_at_once(lab: LabFactory) -> None:
    server = Server()
    async with lab(server) as links:
        _, writer = await opened(links, server)
        await to_thread(links.link.bandwidth, "b", "a", 1)
        writer.write(bytes(1_000_000))  # a thousand seconds
        await elsewhere(links)
        await to_thread(links.link.lift, "b", "a", "bandwidth")
        await until(lambda: len(server.data) == 1_000_000)


async def test_slices_arrive_apart(lab: LabFactory) -> None:
    server = Server()
    async with lab(server) as links:
        _, writer = await opened(links, server)
        await to_thread(links.link.slicer, "b", "a", 10, 0, 50_000)
        sent_at = time.monotonic()
        writer.write(bytes(range(50)))
        await until(lambda: server.data == bytes(range(50)))
        assert server.arrivals[-1][0] - sent_at >= 0.2
        assert len(server.arrivals) > 2


# hold


@pytest.mark.parametrize("end", [False, True])
async def test_a_one_way_hold_keeps_one_direction_back_and_lets_the_other_through(lab: LabFactory, end: bool) -> None:
    server = Server()
    async with lab(server, default_ms=5) as links:
        reader, writer = await opened(links, server)
        await to_thread(links.link.hold, "b", "a")
        writer.write(b"held")
        if end:
            writer.write_eof()
        server.send(b"free")
        assert await reader.readexactly(4) == b"free"
        await elsewhere(links)
        assert (server.data, server.ended) == (b"", 0)
        await to_thread(links.link.lift, "b", "a")
        await until(lambda: server.data == b"held" and server.ended == int(end))


async def test_a_one_way_hold_of_the_way_back_holds_answers_only(lab: LabFactory) -> None:
    server = Server()
    async with lab(server, default_ms=5) as links:
        reader, writer = await opened(links, server)
        await to_thread(links.link.hold, "a", "b")
        writer.write(b"free")
        await until(lambda: server.data == b"free")
        server.send(b"held")
        await elsewhere(links)
        assert nothing_came(reader)
        await to_thread(links.link.heal)
        assert await reader.readexactly(4) == b"held"


async def test_a_hold_of_a_way_concerns_whoever_opened_the_connection(lab: LabFactory) -> None:
    server = Server()
    async with lab(server, default_ms=5) as links:
        reader, writer = await opened(links, server, A, "b")
        await to_thread(links.link.hold, "b", "a")
        writer.write(b"free")
        await until(lambda: server.data == b"free")
        server.send(b"held")
        await elsewhere(links)
        assert nothing_came(reader)
        await to_thread(links.link.lift, "b", "a", "timeout")
        assert await reader.readexactly(4) == b"held"


async def test_a_silent_partition_hides_even_a_death_until_it_heals(lab: LabFactory) -> None:
    server = Server()
    async with lab(server, default_ms=5) as links:
        _, writer = await opened(links, server)
        await to_thread(links.link.hold_both, "a", "b")
        writer.write(b"last words")
        await writer.drain()
        writer.transport.abort()
        await elsewhere(links)
        assert (server.data, server.ended) == (b"", 0)
        await to_thread(links.link.lift_both, "a", "b")
        await until(lambda: server.data == b"last words" and server.ended == 1)


@pytest.mark.parametrize("way", [("b", "a"), ("a", "b")])
async def test_a_new_connection_hangs_during_a_hold_of_either_way(lab: LabFactory, way: tuple[str, str]) -> None:
    server = Server()
    async with lab(server, default_ms=5) as links:
        await to_thread(links.link.hold, *way)
        reader, writer = await links.call(B)
        writer.write(b"ping")
        await elsewhere(links)
        assert server.calls == 1  # from elsewhere
        assert nothing_came(reader)
        await to_thread(links.link.heal)
        async with asyncio.timeout(60):
            assert await reader.readexactly(4) == b"pong"


@pytest.mark.parametrize("kind", ["hold_both", "cut_both"])
@pytest.mark.parametrize("give_up", [lambda w: w.close(), lambda w: w.write_eof(), lambda w: w.transport.abort()])
async def test_a_caller_that_gave_up_before_its_handshake_is_never_seen(
    lab: LabFactory, kind: str, give_up: Callable[[asyncio.StreamWriter], None]
) -> None:
    server = Server()
    async with lab(server) as links:
        await to_thread(getattr(links.link, kind), "a", "b")
        _, writer = await links.call(B)
        writer.write(b"a write that must not happen")
        await writer.drain()
        give_up(writer)
        await elsewhere(links)
        await to_thread(links.link.heal)
        await opened(links, server)
        assert (server.calls, server.data) == (2, b"")


async def test_a_hold_slows_its_sender_in_the_end_and_loses_nothing(lab: LabFactory) -> None:
    server, total = Server(), 32 * 1024 * 1024
    async with lab(server, queue=1024 * 1024) as links:
        await to_thread(links.link.hold, "a", "c")  # another way: no matter
        with socket.create_connection((ADDRESS["a"], links.port), source_address=(B, 0)) as sock:
            sock.sendall(b"x")
            await until(lambda: server.data == b"x")
            await to_thread(links.link.hold, "b", "a")
            sock.setblocking(False)
            accepted = await send_until_blocked(sock, total)
            assert accepted < total // 2
            assert server.data == b"x"
            await to_thread(links.link.heal)
            await asyncio.get_running_loop().sock_sendall(sock, bytes(total - accepted))
            await until(lambda: sum(len(data) for _, data in server.arrivals) == 1 + total, timeout_s=60)


# timeout, reset_peer, down, reset


@pytest.mark.parametrize("way", [("b", "a"), ("a", "b")])
async def test_a_timeout_closes_open_and_new_connections_without_delivering(
    lab: LabFactory, way: tuple[str, str]
) -> None:
    server = Server()
    async with lab(server) as links:
        reader, writer = await opened(links, server)
        began_at = time.monotonic()
        await to_thread(links.link.timeout, *way, 200)
        new, _ = await links.call(B)
        (writer.write if way == ("b", "a") else server.send)(b"never")
        async with asyncio.timeout(60):
            assert await reader.read(-1) == b""
            assert time.monotonic() - began_at >= 0.2
            assert await new.read(-1) == b""
        await until(lambda: server.ended == 1)
        assert (server.data, server.calls) == (b"", 1)


async def test_a_timeout_lifted_in_time_delivers(lab: LabFactory) -> None:
    server = Server()
    async with lab(server) as links:
        reader, writer = await opened(links, server)
        await to_thread(links.link.timeout, "b", "a", 60_000)
        writer.write(b"ping")
        await to_thread(links.link.heal)
        assert await reader.readexactly(4) == b"pong"


@pytest.mark.parametrize("way", [("b", "a"), ("a", "b")])
async def test_reset_peer_resets_open_and_new_connections_after_its_time(lab: LabFactory, way: tuple[str, str]) -> None:
    server = Server()
    async with lab(server) as links:
        reader, _ = await opened(links, server)
        began_at = time.monotonic()
        await to_thread(links.link.reset_peer, *way, 200)
        assert await is_reset(reader)
        assert time.monotonic() - began_at >= 0.2
        await until(lambda: server.ended == 1)
        began_at, new = await opened_in_time(links, server)  # until then bytes pass
        assert await is_reset(new)
        assert time.monotonic() - began_at >= 0.2
        await to_thread(links.link.heal)
        await opened(links, server)


async def test_a_link_that_is_down_resets_open_and_new_connections_of_its_pair(lab: LabFactory) -> None:
    server = Server()
    async with lab(server) as links:
        other = await opened(links, server, C)
        reader, _ = await opened(links, server)
        await to_thread(links.link.down, "b", "a")
        assert await is_reset(reader)
        new, _ = await links.call(B)
        assert await is_reset(new)
        await elsewhere(links)
        assert server.calls == 3
        other[1].write(b"ping")
        assert await other[0].readexactly(4) == b"pong"
        await to_thread(links.link.up, "b", "a")
        await opened(links, server)


async def test_a_reset_is_once(lab: LabFactory) -> None:
    server = Server()
    async with lab(server, default_ms=5) as links:
        reader, _ = await opened(links, server)
        await to_thread(links.link.reset, "b", "a")
        assert await is_reset(reader)
        await until(lambda: server.ended == 1)
        await opened(links, server)


# cut


async def test_after_a_cut_what_lost_bytes_is_reset_and_what_was_silent_goes_on(lab: LabFactory) -> None:
    server = Server()
    async with lab(server, default_ms=5) as links:
        silent_reader, silent_writer = await opened(links, server)
        reader, writer = await opened(links, server)
        await to_thread(links.link.cut_both, "a", "b")
        writer.write(b"lost")
        server.send(b"lost too")
        await elsewhere(links)
        assert (server.data, server.ended, nothing_came(reader)) == (b"", 0, True)
        await to_thread(links.link.lift_both, "a", "b", "cut")
        assert await is_reset(reader)
        await until(lambda: server.ended == 1)
        assert server.data == b""
        silent_writer.write(b"ping")
        assert await silent_reader.readexactly(4) == b"pong"
        counters = await links.counters()
        assert (counters.pair("b", "a").bytes_lost, counters.pair("a", "b").bytes_lost) == (4, 8)


async def test_a_death_during_a_cut_is_seen_only_after_it(lab: LabFactory) -> None:
    server = Server()
    async with lab(server) as links:
        _, writer = await opened(links, server)
        await to_thread(links.link.cut, "b")
        writer.transport.abort()
        await elsewhere(links)
        assert server.ended == 0
        await to_thread(links.link.restore, "b")
        await until(lambda: server.ended == 1)


async def test_bytes_under_way_die_with_a_cut(lab: LabFactory) -> None:
    server = Server()
    async with lab(server) as links:
        reader, writer = await opened(links, server)
        await to_thread(links.link.set_link, "b", "a", 10_000)
        writer.write(b"under way")
        await writer.drain()
        await elsewhere(links)
        await to_thread(links.link.cut, "a")
        await to_thread(links.link.heal)
        assert await is_reset(reader)
        assert (await links.counters()).pair("b", "a").bytes_lost == len(b"under way")


async def test_a_region_that_is_cut_off_reaches_no_other_and_none_reaches_it(lab: LabFactory) -> None:
    server = Server()
    async with lab(server) as links:
        await to_thread(links.link.cut, "b")
        hanging = [await links.call(B), await links.call(A, "b"), await links.call(C, "b")]
        for _, writer in hanging:
            writer.write(b"ping")
        await elsewhere(links)
        await warmed_locally(links)
        assert server.calls == 2
        assert all(nothing_came(reader) for reader, _ in hanging)
        await to_thread(links.link.restore, "b")
        for reader, _ in hanging:
            async with asyncio.timeout(60):
                assert await reader.readexactly(4) == b"pong"


async def warmed_locally(links: Lab) -> None:
    """Inside a region that is cut off everything goes on."""
    reader, writer = await links.call(B, "b")
    writer.write(b"ping")
    async with asyncio.timeout(60):
        assert await reader.readexactly(4) == b"pong"


# all together


async def test_healing_ends_every_fault_and_keeps_the_lag(lab: LabFactory) -> None:
    server = Server()
    async with lab(server, default_ms=30) as links:
        reader, writer = await opened(links, server)
        for break_it in (
            lambda link: link.latency("b", "a", 100_000),
            lambda link: link.bandwidth("a", "b", 1),
            lambda link: link.slicer("a", "b", 1, 0, 100_000_000),
            lambda link: link.hold_both("a", "b"),
            lambda link: link.cut("c"),
            lambda link: link.down("c", "a"),
        ):
            await to_thread(break_it, links.link)
        await to_thread(links.link.heal)
        sent_at = time.monotonic()
        writer.write(b"ping")
        async with asyncio.timeout(60):
            assert await reader.readexactly(4) == b"pong"
        assert time.monotonic() - sent_at >= 0.06
        await elsewhere(links)
        states = await to_thread(links.link.proxies)
        assert all(state.enabled and not state.toxics for state in states.values())
        assert (await links.counters()).pair("b", "a").one_way_ms == 30


def faults(link: LinkControl) -> list[tuple[Callable[..., None], tuple[int, ...]]]:
    return [
        (link.hold, ()),
        (link.lift, ()),
        (link.latency, (20, 20)),
        (link.bandwidth, (2_000,)),
        (link.slicer, (2_000, 1_000)),
    ]


async def test_a_transfer_survives_everything_that_loses_nothing(lab: LabFactory) -> None:
    payload = os.urandom(8 * 1024 * 1024)
    rng = random.Random(7)

    async with lab(echo, default_ms=3) as links:
        reader, writer = await warmed(await links.call(B))

        async def send() -> None:
            writer.write(payload)
            await writer.drain()
            writer.write_eof()

        def disturb(link: LinkControl) -> None:
            for way in (("a", "b"), ("b", "a")) * 15:
                break_it, numbers = rng.choice(faults(link))
                break_it(*way, *numbers)
            link.heal()

        sending = asyncio.create_task(send())
        disturbing = asyncio.create_task(to_thread(disturb, links.link))
        received = await reader.read(-1)
        await asyncio.gather(sending, disturbing)
    assert hashlib.sha256(received).digest() == hashlib.sha256(payload).digest()


async def test_the_control_client_may_be_used_in_many_threads(lab: LabFactory) -> None:
    async with lab(echo) as links:

        def work(_: int) -> None:
            for _ in range(10):
                links.link.hold_both("a", "b")
                links.link.lift_both("a", "b")
                links.link.counters()

        await asyncio.gather(*(to_thread(work, i) for i in range(8)))
        assert all(not state.toxics for state in (await to_thread(links.link.proxies)).values())


async def test_more_callers_than_the_servers_queue_takes_are_connected_when_a_hold_ends(lab: LabFactory) -> None:
    async with lab(echo) as links:
        await to_thread(links.link.hold_both, "a", "b")
        streams = await asyncio.gather(*(links.call(B) for _ in range(500)))  # asyncio's queue: 100
        for _, writer in streams:
            writer.write(b"ping")
        await to_thread(links.link.heal)
        assert set(await asyncio.gather(*(reader.readexactly(4) for reader, _ in streams))) == {b"ping"}
        assert (await links.counters()).refused == {"a": 0, "b": 0, "c": 0}


async def test_five_hundred_connections_survive_a_hold_and_are_reset_by_a_cut(lab: LabFactory) -> None:
    async with lab(echo, default_ms=2) as links:
        streams = await asyncio.gather(*(links.call(B) for _ in range(500)))
        await asyncio.gather(*(warmed(stream) for stream in streams))
        await to_thread(links.link.hold_both, "a", "b")
        for _, writer in streams:
            writer.write(b"held")
        await to_thread(links.link.heal)
        assert set(await asyncio.gather(*(reader.readexactly(4) for reader, _ in streams))) == {b"held"}
        await to_thread(links.link.cut, "b")
        for _, writer in streams:
            writer.write(b"lost")
        await until_lost(links, 4 * 500)
        await to_thread(links.link.heal)
        assert all(await asyncio.gather(*(is_reset(reader) for reader, _ in streams)))


async def until_lost(links: Lab, count: int) -> None:
    async with asyncio.timeout(60):
        while (await links.counters()).pair("b", "a").bytes_lost < count:  # noqa: ASYNC110 - counted elsewhere
            await asyncio.sleep(0.005)


async def test_an_unknown_region_is_refused_by_name(lab: LabFactory) -> None:
    async with lab(echo) as links:
        for ask in (
            lambda: links.link.hold("a", "mars"),
            lambda: links.link.cut("mars"),
            lambda: links.link.reset("mars", "a"),
            lambda: links.link.set_link("a", "mars", 1),
        ):
            with pytest.raises(LinkRefused, match="mars") as refused:
                await to_thread(ask)
            assert refused.value.status == 404
