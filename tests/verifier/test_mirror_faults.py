"""Faults of a log and of its servers, on real ones: nobody forgets, and nobody is fresh who may lack something."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from tests.keyservice.support import Server as TcpServer
from tests.verifier.http_server import free_port
from tests.verifier.mirrors import (
    Heard,
    Mirroring,
    client,
    holds,
    mirroring,
    module_dir,
    over_redis,
    primary,
    reaches,
    server,
    shared_server,
    short_rounds,
    staleness,
    started,
)
from tests.verifier.support import NONCE, NONCE_2, entry, make_verifier, token_of, until
from tests.verifier.valkey import PASSWORD, Primary, Server, command, live, running
from verifier import Undecidable, Verifier
from verifier.log import EPOCH_KEY, LOG_KEY, META_KEY
from verifier.mirroring import MirrorThread
from verifier.replica import ReplicaMirror
from verifier.revocations import Snapshot
from verifier.testing import SigningKey

__all__ = ["client", "mirroring", "module_dir", "primary", "server", "shared_server", "short_rounds"]


def fresh(mirror: MirrorThread) -> None:
    until(lambda: staleness(mirror).fresh, f"fresh, not {staleness(mirror)}")


def another_round(mirror: MirrorThread) -> None:
    read = mirror.view
    until(lambda: mirror.view is not read, "another round")


# -- what a listener hears -------------------------------------------------------------------------------------------


def test_a_listener_hears_where_a_read_begins_each_entry_once_and_what_contradicts_nothing(
    mirroring: Mirroring, server: Server, primary: Primary, client: redis.Redis
) -> None:
    heard = Heard()
    primary.append(*live("jti", ["a"]))
    with mirroring(server, heard) as mirror:
        reaches(mirror, primary.position)
        primary.append(*live("jti", ["b"]))
        until(lambda: heard.calls[-2:] == [primary.position, "round"], "both")
        assert heard.calls == ["begin", f"1-0.{NONCE}", f"1-1.{NONCE}", "round", f"1-2.{NONCE}", "round"]
        primary.remove(2)
        until(lambda: heard.calls[6:] == ["begin", f"1-0.{NONCE}", f"1-1.{NONCE}", "round"], "read again")
        assert heard.last is not None
        assert (str(heard.last.position), heard.last.epoch.number, heard.last.gaps) == (f"1-1.{NONCE}", 1, frozenset())
        client.flushall()
        until(lambda: heard.calls[-1] == "absent", "no log is heard too")


# -- holes -----------------------------------------------------------------------------------------------------------


def test_a_deletion_behind_a_mirror_is_noticed_and_takes_nothing_from_it_but_a_later_one_is_not_fresh(
    mirroring: Mirroring, server: Server, primary: Primary
) -> None:
    primary.append(*live("jti", ["a", "b", "c", "d"]))
    primary.beat()
    heard = Heard()
    with mirroring(server, heard) as early:
        fresh(early)
        primary.remove(2)
        until(lambda: early.counters["reread_deleted"] == 1, "noticed")
        primary.append(*live("jti", ["e"]))
        primary.beat()
        reaches(early, primary.position)
        fresh(early)
        assert [holds(early, jti) for jti in "abcde"] == [True] * 5
        assert heard.last is not None
        assert [(str(left), str(right)) for left, right in heard.last.gaps] == [(f"1-1.{NONCE}", f"1-3.{NONCE}")]
        assert early.counters["rereads"] == early.counters["reread_deleted"] + early.counters["reread_hole"]
        with mirroring(server) as late:
            reaches(late, primary.position)
            until(lambda: staleness(late).reason == "hole", "named")
            assert not holds(late, "b")


def test_an_epoch_that_names_the_hole_answers_it_also_for_mirrors_that_start_later(
    mirroring: Mirroring, server: Server, primary: Primary
) -> None:
    primary.append(*live("jti", ["a", "b", "c"]))
    primary.remove(2)
    primary.open_epoch(2, NONCE_2, holes=[(f"1-1.{NONCE}", f"1-3.{NONCE}")])
    primary.append(*live("jti", ["b"]))
    primary.beat()
    with mirroring(server) as mirror:
        fresh(mirror)
        assert [holds(mirror, jti) for jti in "abc"] == [True] * 3


@pytest.mark.parametrize("holes", [[], [(f"1-0.{NONCE}", f"1-2.{NONCE}")], [(f"1-1.{NONCE_2}", f"1-3.{NONCE}")]])
def test_an_older_epochs_hole_that_no_epoch_names_keeps_a_new_mirror_from_being_fresh(
    mirroring: Mirroring, server: Server, primary: Primary, holes: list[tuple[str, str]]
) -> None:
    # The entry was acknowledged and is deleted after the regions merged into epoch 2: nobody has added it again.
    primary.append(*live("jti", ["a", "b", "c"]))
    primary.open_epoch(2, NONCE_2, holes=holes)
    primary.beat()
    primary.remove(2, number=1)
    with mirroring(server) as mirror:
        until(lambda: staleness(mirror).reason == "hole", "named")
        primary.beat()
        another_round(mirror)
        assert not staleness(mirror).fresh


def test_a_hole_is_gone_when_the_log_is_trimmed_past_it(mirroring: Mirroring, server: Server, primary: Primary) -> None:
    primary.append(*live("jti", ["a", "b", "c", "d"]))
    primary.remove(2)
    primary.beat()
    with mirroring(server) as mirror:
        until(lambda: staleness(mirror).reason == "hole", "named")
        primary.trim(2)
        fresh(mirror)
        assert mirror.counters["reread_trimmed"] == 1


# -- rewinds, resets, other logs ---------------------------------------------------------------------------------------


def test_a_sleeper_that_the_log_was_trimmed_past_reads_it_again(
    mirroring: Mirroring, server: Server, primary: Primary
) -> None:
    primary.append(*live("jti", ["a", "b"]))
    primary.beat()
    with mirroring(server) as mirror:
        fresh(mirror)
        mirror.close()
        primary.append(*live("jti", ["c", "d", "e"]))
        primary.trim(4)
        primary.beat()
        mirror.start()
        reaches(mirror, primary.position)
        fresh(mirror)
        assert [holds(mirror, jti) for jti in "abcde"] == [True, True, False, False, True]


@pytest.mark.parametrize("key_name", [LOG_KEY, EPOCH_KEY, META_KEY])
def test_a_part_of_the_log_that_an_operator_deletes_is_named_and_the_mirror_ages(
    mirroring: Mirroring, server: Server, primary: Primary, client: redis.Redis, key_name: str
) -> None:
    primary.append(*live("jti", ["a"]))
    primary.beat()
    with mirroring(server) as mirror:
        fresh(mirror)
        client.delete(key_name)
        until(lambda: mirror.view.problem == "no_trust_log", "named")
        assert holds(mirror, "a")
        assert staleness(mirror, bound=0.0).reason == "stale"


def test_another_log_in_its_place_is_read_too_and_vouches_for_nothing_unless_it_is_a_successor(
    mirroring: Mirroring, server: Server, primary: Primary, client: redis.Redis
) -> None:
    primary.append(*live("jti", ["a"]))
    primary.beat()
    with mirroring(server) as mirror:
        fresh(mirror)
        before = mirror.view.freshness.confirmed
        with client.pipeline(transaction=True) as pipe:
            pipe.delete(LOG_KEY, EPOCH_KEY, META_KEY)
            pipe.execute()
        other = Primary(client, number=9, nonce=NONCE_2, incarnation="another")
        other.append(*live("jti", ["b"]))
        reaches(mirror, other.position)
        assert mirror.view.freshness.confirmed is before
        other.beat()
        until(lambda: staleness(mirror, bound=0.0).reason == "another_log", "named")
        assert mirror.view.freshness.confirmed is before
        known = {"number": 1, "nonce": NONCE, "previous": None, "voters": {}, "opened": True}
        client.hset(EPOCH_KEY, "known", json.dumps([known]))
        other.beat()
        until(lambda: mirror.view.freshness.confirmed is not before, "its beat")
        assert [holds(mirror, jti) for jti in "ab"] == [True] * 2


def test_one_number_with_two_histories_is_two_histories(
    mirroring: Mirroring, server: Server, primary: Primary, client: redis.Redis
) -> None:
    primary.append(*live("jti", [f"t-{n}" for n in range(1, 6)]))
    primary.beat()
    with mirroring(server) as mirror:
        fresh(mirror)
        confirmed = mirror.view.freshness.confirmed
        mirror.close()
        client.flushall()
        other = Primary(client, number=1, nonce=NONCE_2)
        other.append(*live("jti", [f"u-{n}" for n in range(1, 7)]))  # dense past the position held
        mirror.start()
        reaches(mirror, other.position)
        assert mirror.view.freshness.confirmed is confirmed
        assert all(holds(mirror, f"t-{n}") for n in range(1, 6))
        assert all(holds(mirror, f"u-{n}") for n in range(1, 7))


def test_in_a_closed_epoch_the_last_confirmed_beat_goes_on_ageing_and_the_entries_are_enforced(
    mirroring: Mirroring, server: Server, primary: Primary
) -> None:
    primary.beat()
    with mirroring(server) as mirror:
        fresh(mirror)
        confirmed = mirror.view.freshness.confirmed
        primary.open_epoch(2, NONCE_2, opened=False)
        primary.append(*live("jti", ["a"]))
        primary.beat()  # whoever wrote that it is confirmed was wrong
        reaches(mirror, primary.position)
        another_round(mirror)
        assert mirror.view.freshness.confirmed is confirmed
        assert (holds(mirror, "a"), mirror.view.freshness.epoch_open) == (True, False)


def test_a_beat_whose_epoch_ends_in_the_same_batch_is_applied_on_the_way(
    mirroring: Mirroring, server: Server, primary: Primary
) -> None:
    with mirroring(server) as mirror:
        reaches(mirror, primary.position)
        mirror.close()
        primary.seq += 2
        primary.beat()
        primary.seq -= 2
        mirror.start()
        until(lambda: mirror.view.freshness.pending_confirmed is not None, "heard and not applied")
        mirror.close()
        primary.append(*live("jti", ["a", "b"]))
        primary.open_epoch(2, NONCE_2, opened=False)
        mirror.start()
        reaches(mirror, primary.position)
        assert mirror.view.freshness.confirmed is not None


# -- dropping --------------------------------------------------------------------------------------------------------


def test_nothing_is_dropped_on_the_word_of_a_beat_that_nobody_confirmed(
    mirroring: Mirroring, server: Server, primary: Primary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("verifier.mirroring.DROP_EVERY_S", 0.0)
    primary.append(entry("jti", "over", expires_at=int(time.time()) - 400))
    primary.beat(confirmed=False)
    with mirroring(server) as mirror:
        until(lambda: mirror.view.freshness.applied is not None, "the beat")
        another_round(mirror)
        assert holds(mirror, "over")
        primary.beat()
        until(lambda: not holds(mirror, "over"), "dropped")


# -- servers ---------------------------------------------------------------------------------------------------------


def test_a_mirror_started_in_a_partition_enforces_what_it_reads_and_knows_its_age(
    mirroring: Mirroring, server: Server, primary: Primary
) -> None:
    primary.append(*live("jti", ["a"]))
    primary.beat(at=time.time() - 60)  # the replica's last word from its primary
    with mirroring(server) as mirror:
        reaches(mirror, primary.position)
        assert holds(mirror, "a")
        until(lambda: mirror.view.freshness.confirmed is not None, "the beat")
        assert staleness(mirror, bound=5.0).reason == "stale"
        assert (staleness(mirror).seconds or 0) >= 59


def test_a_server_that_stops_answering_is_named_and_followed_again(run_dir: Path) -> None:
    with running(run_dir) as server:
        with server.client() as client:
            primary = Primary(client)
            primary.append(*live("jti", ["a"]))
            primary.beat()
        with over_redis(server) as mirror:
            fresh(mirror)
            process = server._process
            assert process is not None
            process.send_signal(signal.SIGSTOP)
            try:
                until(lambda: mirror.view.problem == "timeout", "a half-open socket is a dead one")
                assert holds(mirror, "a")
                assert (staleness(mirror).seconds or 0) >= 2
            finally:
                process.send_signal(signal.SIGCONT)
            with server.client() as client:
                primary.client = client
                primary.append(*live("jti", ["b"]))
                primary.beat()
            reaches(mirror, primary.position)
            fresh(mirror)
            assert (holds(mirror, "b"), mirror.counters["rereads"]) == (True, 0)


@pytest.fixture
def pair(run_dir: Path) -> Iterator[Callable[..., tuple[TcpServer, TcpServer]]]:
    """``pair("--setting", "value")``: a primary and a replica of it that has the settings."""
    servers: list[TcpServer] = []

    def start(*settings: str) -> tuple[TcpServer, TcpServer]:
        port = str(free_port())
        up = TcpServer(run_dir, "up", ("--port", port, "--bind", "127.0.0.1", "--enable-debug-command", "yes"))
        down = TcpServer(
            run_dir,
            "down",
            ("--port", str(free_port()), "--bind", "127.0.0.1", "--replicaof", "127.0.0.1", port, *settings),
        )
        for one in (up, down):
            servers.append(one)
            one.start()
        with down.client() as client:
            until(lambda: client.info("replication")["master_link_status"] == "up", "replicating")
        return up, down

    yield start
    for one in servers:
        one.kill()


@pytest.mark.parametrize("mode", ["disabled", "on-empty-db", "swapdb"])
def test_a_full_resync_on_a_quiet_stream_loses_nothing(pair: Callable[..., Any], mode: str) -> None:
    up, down = pair("--repl-diskless-load", mode)
    with up.client() as client, over_redis(down.url) as mirror:
        primary = Primary(client)
        primary.append(*live("jti", ["a"]))
        primary.beat()
        fresh(mirror)
        syncs = client.info("stats")["sync_full"]
        command(client, "DEBUG", "CHANGE-REPL-ID")
        command(client, "CLIENT", "KILL", "TYPE", "replica")
        primary.append(*live("jti", ["in-between"]))
        until(lambda: client.info("stats")["sync_full"] > syncs, "a full resync")
        primary.append(*live("jti", ["after"]))
        primary.beat()
        reaches(mirror, primary.position)
        fresh(mirror)
        assert [holds(mirror, jti) for jti in ("a", "in-between", "after")] == [True] * 3


def test_a_replica_that_loads_is_named_and_takes_nothing_from_the_mirror(
    pair: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("verifier.redis_connecting.REDIS_TIMEOUT_S", 0.3)
    slow = ("--key-load-delay", "5000", "--loading-process-events-interval-bytes", "1024")
    up, down = pair("--repl-diskless-load", "disabled", *slow)
    with up.client() as client, over_redis(down.url) as mirror:
        primary = Primary(client)
        primary.append(*live("jti", ["a"]))
        primary.beat()
        fresh(mirror)
        client.mset({f"filler-{n}": "x" * 100 for n in range(12_000)})  # a minute of loading, unless it is sped up
        seen: list[str | None] = []
        mirror.subscribe(lambda view: seen.append(view.problem))
        command(client, "DEBUG", "CHANGE-REPL-ID")
        command(client, "CLIENT", "KILL", "TYPE", "replica")
        until(lambda: "loading" in seen, "named")
        with down.client() as loading:
            loading.config_set("key-load-delay", 0)
        assert holds(mirror, "a")
        primary.append(*live("jti", ["b"]))
        primary.beat()
        reaches(mirror, primary.position)
        fresh(mirror)
        assert holds(mirror, "b")


def test_a_primary_that_restarts_empty_empties_its_replica_and_no_mirror(pair: Callable[..., Any]) -> None:
    up, down = pair()
    with over_redis(down.url) as mirror:
        with up.client() as client:
            primary = Primary(client)
            primary.append(*live("jti", ["a"]))
            primary.beat()
            fresh(mirror)
        up.kill()
        up.start()
        until(lambda: mirror.view.problem == "no_trust_log", "the emptied replica is named")
        assert holds(mirror, "a")
        with up.client() as client:
            again = Primary(client, number=9, nonce=NONCE_2, incarnation="second")
            again.append(*live("jti", ["b"]))
            again.beat()
            reaches(mirror, again.position)
            fresh(mirror)
            assert [holds(mirror, jti) for jti in "ab"] == [True] * 2


def test_another_node_is_read_from_its_first_entry_and_united(run_dir: Path, server: Server, primary: Primary) -> None:
    primary.append(*live("jti", ["a", "b"]))
    second = run_dir / "second"
    second.mkdir()
    with running(second) as other:
        with other.client() as client:
            there = Primary(client, number=1, nonce=NONCE_2)
            there.append(*live("jti", ["c", "d", "e"]))
            there.beat()
        proxy = Proxy(server.socket)
        nodes = [proxy.url, f"unix://{other.socket}"]
        with proxy, started(ReplicaMirror(nodes, password=PASSWORD)) as mirror:
            reaches(mirror, primary.position)
            proxy.close()
            reaches(mirror, there.position)
            assert [holds(mirror, jti) for jti in "abcde"] == [True] * 5


class Proxy:
    """A TCP port in front of a unix socket that can be closed without the server noticing."""

    def __init__(self, target: Path) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._target = target
        self._ends: list[socket.socket] = []
        self.url = f"redis://127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> Proxy:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def close(self) -> None:
        for end in (self._listener, *self._ends):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            far = socket.socket(socket.AF_UNIX)
            far.connect(str(self._target))
            self._ends += [near, far]
            for one, other in ((near, far), (far, near)):
                threading.Thread(target=self._pump, args=(one, other), daemon=True).start()

    def _pump(self, one: socket.socket, other: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while chunk := one.recv(65_536):
                other.sendall(chunk)
        with contextlib.suppress(OSError):
            other.shutdown(socket.SHUT_RDWR)


# -- the verifier on top ---------------------------------------------------------------------------------------------


@pytest.fixture
def verifier(server: Server, primary: Primary, key: SigningKey) -> Iterator[Verifier]:
    with live_verifier(server, key, min_position_wait_s=0.2) as made:
        yield made


@pytest.fixture
def patient(server: Server, primary: Primary, key: SigningKey) -> Iterator[Verifier]:
    """One that waits for a position however slow the machine is."""
    with live_verifier(server, key, min_position_wait_s=60) as made:
        yield made


def live_verifier(server: Server, key: SigningKey, **settings: Any) -> Verifier:
    return make_verifier(key, redis_url=server.url, clock=time, on_stale="deny", max_staleness_s=600, **settings)


def live_claims(key: SigningKey, **claims: Any) -> str:
    now = int(time.time())
    return token_of(key, iat=now, exp=now + 900, **claims)


def test_a_position_is_waited_for_and_a_later_epoch_counts_only_once_it_is_open_and_confirmed(
    server: Server, primary: Primary, verifier: Verifier, patient: Verifier, key: SigningKey
) -> None:
    primary.beat()
    assert verifier.wait_ready(60)
    assert patient.wait_ready(60)
    until(lambda: verifier.status().fresh and patient.status().fresh, "fresh")
    token = live_claims(key)
    reached = primary.append(*live("jti", ["other"]))
    assert patient.verify(token, min_position=reached)
    ahead = f"1-{primary.seq + 1}.{NONCE}"
    with pytest.raises(Undecidable, match="min_position"):
        verifier.verify(token, min_position=ahead)
    appending = threading.Timer(0.05, primary.append, live("jti", ["awaited"]))
    appending.start()
    assert patient.verify(token, min_position=ahead)
    appending.join()

    wanted = f"1-{primary.seq + 9}.{NONCE}"  # acknowledged where the log was lost
    primary.open_epoch(2, NONCE_2, opened=False)
    primary.beat(confirmed=False)
    until(lambda: verifier.status().nonce == NONCE_2, "the next epoch")
    with pytest.raises(Undecidable, match="min_position"):
        verifier.verify(token, min_position=wanted)
    primary.chain[-1]["opened"] = True
    primary.client.hset(EPOCH_KEY, "open", "1")
    primary.beat()
    assert patient.verify(token, min_position=wanted)


def test_what_is_fresh_enforces_all_that_was_appended_before_the_beat_also_while_it_catches_up(
    server: Server, primary: Primary, key: SigningKey
) -> None:
    """40,000 revocations at once: whoever calls itself fresh by the beat after them holds every one."""
    with over_redis(server) as mirror:
        primary.beat()
        fresh(mirror)
        fooled: list[int] = []
        marks: list[tuple[float, int]] = []

        def watch(view: Any) -> None:
            snapshot: Snapshot = view.snapshot
            confirmed = view.freshness.confirmed
            held = sum(beat_entries for at, beat_entries in marks[-1:] if confirmed and confirmed.at_s >= at)
            if snapshot.entries < held:
                fooled.append(snapshot.entries)

        mirror.subscribe(watch)
        for batch in range(8):
            primary.append(*live("jti", [f"{batch}-{n}" for n in range(5_000)]))
            at = time.time()
            marks.append((int(at * 1000) / 1000, (batch + 1) * 5_000))
            primary.beat(at=at)
        reaches(mirror, primary.position)
        fresh(mirror)
        assert fooled == []
        assert mirror.snapshot.entries == 40_000
        assert mirror.counters["rereads"] == 0
