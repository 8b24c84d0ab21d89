"""A mirror's sockets: half-open ones are noticed and left, and closing leaves none, nor a thread, at any moment."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.verifier.blackhole import BlackHole, Way
from tests.verifier.mirrors import (
    OnEntries,
    client,
    holds,
    module_dir,
    over_redis,
    primary,
    reaches,
    server,
    shared_server,
    short_rounds,
    started,
)
from tests.verifier.support import make_verifier, until
from tests.verifier.valkey import PASSWORD, Primary, Server, live
from verifier.limits import REDIS_TIMEOUT_S, TAIL_BLOCK_MS
from verifier.mirroring import MirrorThread
from verifier.replica import ReplicaMirror
from verifier.testing import SigningKey

__all__ = ["client", "module_dir", "primary", "server", "shared_server", "short_rounds"]


@pytest.fixture
def hole(server: Server) -> Iterator[BlackHole]:
    with BlackHole(server.socket) as hole:
        yield hole


# -- half-open connections --------------------------------------------------------------------------------------------


def test_the_bound_is_below_the_staleness_that_verifiers_allow() -> None:
    assert TAIL_BLOCK_MS / 1000 < REDIS_TIMEOUT_S
    assert REDIS_TIMEOUT_S + TAIL_BLOCK_MS / 1000 < 5.0


@pytest.mark.parametrize("way", ["both", "to_server", "to_client"])
def test_a_peer_that_vanishes_is_noticed_within_the_bound_and_the_next_node_is_read(
    server: Server, primary: Primary, hole: BlackHole, way: Way
) -> None:
    nodes = [hole.url, f"unix://{server.socket}"]
    problems: list[str | None] = []
    with started(ReplicaMirror(nodes, password=PASSWORD)) as mirror:
        reaches(mirror, primary.position)
        mirror.subscribe(lambda view: problems.append(view.problem))
        hole.swallow(way)
        until(lambda: "timeout" in problems, "noticed")
        primary.append(*live("jti", ["later"]))
        until(lambda: holds(mirror, "later"), "read elsewhere")
        assert hole.accepted == 1
        reaches(mirror, primary.position)


def test_the_time_out_on_the_socket_is_the_bound(server: Server, primary: Primary, hole: BlackHole) -> None:
    mirror = ReplicaMirror(hole.url, password=PASSWORD)
    client = mirror._connectors[0]()
    try:
        sock = mirror._line._socket
        assert sock is not None
        assert sock.gettimeout() == REDIS_TIMEOUT_S
    finally:
        client.close()


def test_one_that_swallows_from_the_first_byte_is_left_too(
    server: Server, primary: Primary, hole: BlackHole, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("verifier.redis_connecting.REDIS_TIMEOUT_S", 0.3)
    hole.swallow("both")
    with started(ReplicaMirror([hole.url, f"unix://{server.socket}"], password=PASSWORD)) as mirror:
        reaches(mirror, primary.position)


def test_alone_it_is_named_and_read_again_once_it_is_heard(
    server: Server, primary: Primary, hole: BlackHole, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("verifier.redis_connecting.REDIS_TIMEOUT_S", 0.3)
    with over_redis(hole.url, password=PASSWORD) as mirror:
        reaches(mirror, primary.position)
        hole.swallow("to_client")
        until(lambda: mirror.view.problem == "timeout", "named")
        hole.heal()
        primary.append(*live("jti", ["a"]))
        reaches(mirror, primary.position)
        assert mirror.view.problem is None


# -- progress ---------------------------------------------------------------------------------------------------------


def test_the_progress_of_the_first_read_is_told(
    server: Server, primary: Primary, key: SigningKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("verifier.replica.READ_BATCH_ENTRIES", 10)
    primary.append(*live("jti", [f"t-{n}" for n in range(99)]))
    verifier = make_verifier(key, redis_url=server.url, clock=time)
    mirror = verifier._mirror
    assert isinstance(mirror, MirrorThread)
    seen: list[tuple[int, int | None, float | None]] = []

    def look(_view: Any) -> None:
        told = verifier.status().first_read
        seen.append((told.entries, told.total, told.fraction))

    mirror.subscribe(look)
    look(None)
    with verifier:
        assert verifier.wait_ready(60)
        primary.append(*live("jti", ["more"]))
        until(lambda: verifier.status().position == primary.position, "and on")
        assert verifier.status().first_read.fraction == 1.0
    assert seen[0] == (0, None, None)
    parts = [entry for entry in dict.fromkeys(seen) if entry[1] is not None]
    assert parts == [(n, 100, n / 100) for n in range(0, 101, 10)]


# -- closing ----------------------------------------------------------------------------------------------------------


def sockets() -> set[str]:
    """The sockets of this process, by their inode."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            link = os.readlink(f"/proc/self/fd/{name}")
            if link.startswith("socket:"):
                found.add(link)
    return found


@contextlib.contextmanager
def nothing_left() -> Iterator[Any]:
    """Whatever is put into the list is closed whole."""
    before = sockets()
    mirrors: list[MirrorThread] = []
    yield mirrors
    for mirror in mirrors:
        mirror.close()
        ended(mirror)
        assert mirror.view.connection == "closed"
    assert sockets() <= before
    assert not [thread for thread in threading.enumerate() if thread.name == "verifier-replica"]


def ended(mirror: MirrorThread) -> None:
    """The thread has ended or is about to: a time-out that it still waited for would be longer than this."""
    if mirror._thread is not None:
        mirror._thread.join(60)
        assert not mirror._thread.is_alive()


linux = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts sockets in /proc")


@linux
def test_closing_while_it_follows(server: Server, primary: Primary) -> None:
    with nothing_left() as mirrors:
        mirrors.append(mirror := ReplicaMirror(server.url))
        mirror.start()
        reaches(mirror, primary.position)


@linux
def test_closing_twice_and_without_having_started(server: Server, primary: Primary) -> None:
    with nothing_left():
        never = ReplicaMirror(server.url)
        never.close()
        never.close()
        mirror = ReplicaMirror(server.url)
        mirror.start()
        reaches(mirror, primary.position)
        mirror.close()
        mirror.close()
        mirror.start()
        reaches(mirror, primary.position)
        mirror.close()


@linux
def test_closing_in_the_first_read(server: Server, primary: Primary, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("verifier.replica.READ_BATCH_ENTRIES", 10)
    primary.append(*live("jti", [f"t-{n}" for n in range(300)]))
    with nothing_left() as mirrors:
        mirrors.append(mirror := ReplicaMirror(server.url))
        mirror.listen(OnEntries(lambda _: time.sleep(0.002)))
        mirror.start()
        until(lambda: mirror.counters["entries_read"] > 0, "reading")
    assert not mirror.view.freshness.synced


@linux
def test_closing_while_it_waits_for_an_answer_waits_for_none(
    server: Server, primary: Primary, hole: BlackHole, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("verifier.redis_connecting.REDIS_TIMEOUT_S", 600.0)
    mirror = ReplicaMirror(hole.url, password=PASSWORD)
    mirror.start()
    reaches(mirror, primary.position)
    hole.swallow("both")
    time.sleep(0.1)  # a round is sent into the void
    mirror.close()
    ended(mirror)
    assert (mirror.view.connection, mirror.view.problem) == ("closed", None)


@linux
def test_closing_while_the_greeting_goes_unanswered_waits_for_none(
    server: Server, primary: Primary, hole: BlackHole, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("verifier.redis_connecting.REDIS_TIMEOUT_S", 600.0)
    hole.swallow("both")
    mirror = ReplicaMirror(hole.url, password=PASSWORD)
    mirror.start()
    until(lambda: hole.accepted == 1, "connected")
    until(lambda: mirror._line._socket is not None, "greeting")
    mirror.close()
    ended(mirror)


@linux
def test_closing_while_it_reconnects(run_dir: Path) -> None:
    with nothing_left() as mirrors:
        mirrors.append(mirror := ReplicaMirror(f"unix://{run_dir}/nobody"))
        mirror.start()
        until(lambda: mirror.counters["disconnects"] >= 3, "trying")


@linux
def test_closing_from_many_threads_at_once_and_from_its_own(server: Server, primary: Primary) -> None:
    with nothing_left() as mirrors:
        mirrors.append(mirror := ReplicaMirror(server.url))
        mirror.subscribe(lambda view: mirror.close() if view.connection == "tailing" else None)
        mirror.start()
        until(lambda: mirror.view.connection == "closed", "closed by itself")
        mirrors.append(other := ReplicaMirror(server.url))
        other.start()
        reaches(other, primary.position)
        closers = [threading.Thread(target=other.close) for _ in range(8)]
        for closer in closers:
            closer.start()
        for closer in closers:
            closer.join(60)
            assert not closer.is_alive()


@linux
def test_closing_a_verifier_closes_all_of_it(server: Server, primary: Primary, key: SigningKey) -> None:
    before = sockets()
    with make_verifier(key, redis_url=server.url, clock=time) as verifier:
        assert verifier.wait_ready(60)
        verifier.close()
        verifier.close()
    assert sockets() <= before


# -- forks ------------------------------------------------------------------------------------------------------------

IMPORTING = """
import sys
from verifier.replica import ReplicaMirror
mirror = ReplicaMirror(sys.argv[1], tail_block_ms=20)
before = set(sys.modules)
mirror.start()
assert mirror.wait_synced(60)
mirror.close()
print(sorted(set(sys.modules) - before))
"""


def test_the_thread_of_a_mirror_imports_nothing_that_a_fork_could_cut_off(
    server: Server, primary: Primary, hole: BlackHole
) -> None:
    url = hole.url.replace("redis://", f"redis://:{PASSWORD.replace(' ', '%20')}@").replace("127.0.0.1", "localhost")
    told = subprocess.run(
        [sys.executable, "-c", IMPORTING, url], capture_output=True, text=True, check=True, timeout=60
    )
    assert told.stdout.strip() == "[]"


def test_a_child_lets_go_of_the_parents_socket_and_the_parent_reads_on(
    server: Server, primary: Primary, hole: BlackHole
) -> None:
    with over_redis(hole.url, password=PASSWORD) as mirror:
        reaches(mirror, primary.position)
        assert isinstance(mirror, ReplicaMirror)
        sock = mirror._line._socket
        assert sock is not None
        copy = os.dup(sock.fileno())  # as a fork leaves it in the child
        child = ReplicaMirror(hole.url, password=PASSWORD)
        child._line._socket = socket.socket(fileno=copy)
        child.abandon()
        with pytest.raises(OSError, match="Bad file descriptor"):
            stat.S_ISSOCK(os.fstat(copy).st_mode)
        primary.append(*live("jti", ["a"]))
        reaches(mirror, primary.position)
        assert mirror.counters["disconnects"] == 0
