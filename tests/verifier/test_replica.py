"""The mirror against a real server: nothing held is ever lost, and every gap is noticed."""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis

from tests.verifier.support import ISSUER, NONCE, NONCE_2, entry, until
from tests.verifier.valkey import PASSWORD, Primary, Server, command, live, running
from verifier.freshness import Staleness
from verifier.log import BEAT_KEY, EPOCH_KEY, LOG_KEY, META_KEY, Entry, Position
from verifier.mirroring import LogListener
from verifier.replica import ReplicaMirror


@pytest.fixture(autouse=True)
def short_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("verifier.replica.TAIL_BLOCK_MS", 20)


@pytest.fixture(scope="module")
def module_dir() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="vt-") as path:
        yield Path(path)


@pytest.fixture(scope="module")
def shared_server(module_dir: Path) -> Iterator[Server]:
    with running(module_dir) as server:
        yield server


@pytest.fixture
def server(shared_server: Server) -> Server:
    with shared_server.client() as client:
        client.flushall()
    return shared_server


@pytest.fixture
def client(server: Server) -> Iterator[redis.Redis]:
    with server.client() as client:
        yield client


@pytest.fixture
def primary(client: redis.Redis) -> Primary:
    return Primary(client)


class OnEntries(LogListener):
    def __init__(self, call: Callable[[list[tuple[Position, Entry]]], None]) -> None:
        self.call = call

    def entries(self, accepted: list[tuple[Position, Entry]]) -> None:
        self.call(accepted)


@contextmanager
def mirroring(server: Server | str, *listeners: LogListener, **settings: Any) -> Iterator[ReplicaMirror]:
    mirror = ReplicaMirror(server if isinstance(server, str) else server.url, **settings)
    for listener in listeners:
        mirror.listen(listener)
    mirror.start()
    try:
        yield mirror
    finally:
        mirror.close()


def holds(mirror: ReplicaMirror, jti: str) -> bool:
    return mirror.view.snapshot.find(issuer=ISSUER, jti=jti) is not None


def reaches(mirror: ReplicaMirror, position: str) -> None:
    until(lambda: str(mirror.view.position) == position and mirror.view.connection == "tailing", f"at {position}")


def staleness(mirror: ReplicaMirror, bound: float = 5.0) -> Staleness:
    return mirror.view.freshness.staleness(now=time.time(), mono=time.monotonic(), max_staleness_s=bound)


# -- reading ---------------------------------------------------------------------------------------------------------


def test_the_first_read_brings_everything_and_the_tail_what_follows(server: Server, primary: Primary) -> None:
    primary.append(*live("jti", ["a", "b"]), *live("sub", ["ada"]))
    primary.beat()
    with mirroring(server) as mirror:
        assert mirror.wait_synced(10)
        reaches(mirror, primary.position)
        assert holds(mirror, "a")
        assert mirror.view.snapshot.entries == 3
        until(lambda: staleness(mirror).fresh, "fresh")
        primary.append(*live("jti", ["c"]))
        reaches(mirror, primary.position)
        assert holds(mirror, "c")
        assert mirror.view.problem is None
    assert mirror.view.connection == "closed"
    assert holds(mirror, "a")


def test_ten_thousand_entries_are_read_at_once(server: Server, primary: Primary) -> None:
    primary.append(*live("jti", [f"t-{n}" for n in range(10_000)]))
    primary.beat()
    with mirroring(server) as mirror:
        assert mirror.wait_synced(10)
        assert mirror.view.snapshot.entries == 10_000
        assert str(mirror.view.position) == primary.position
        assert mirror.counters["entries_read"] == 10_001
        assert mirror.counters["rereads"] == 0
        assert all(holds(mirror, f"t-{n}") for n in range(0, 10_000, 97))


@pytest.mark.parametrize("count", [999, 1000, 1001])
def test_a_log_about_as_long_as_a_batch_is_read_whole(server: Server, primary: Primary, count: int) -> None:
    primary.append(*live("jti", [f"t-{n}" for n in range(count - 1)]))
    with mirroring(server) as mirror:
        assert mirror.wait_synced(10)
        assert (mirror.view.snapshot.entries, mirror.counters["rereads"]) == (count - 1, 0)


def test_a_log_that_appears_later_is_waited_for(server: Server, client: redis.Redis) -> None:
    with mirroring(server) as mirror:
        until(lambda: mirror.view.problem == "no_trust_log", "the empty server is named")
        assert not mirror.wait_synced(0)
        primary = Primary(client)
        assert mirror.wait_synced(10)
        reaches(mirror, primary.position)


def test_entries_are_handed_on_in_order_with_their_positions(server: Server, primary: Primary) -> None:
    seen: list[str] = []
    with mirroring(server, OnEntries(lambda batch: seen.extend(f"{p}={e.value}" for p, e in batch))) as mirror:
        reaches(mirror, primary.position)
        primary.append(*live("jti", ["a", "b"]))
        reaches(mirror, primary.position)
    assert seen[1:] == [f"1-1.{NONCE}=a", f"1-2.{NONCE}=b"]


def test_a_new_epoch_is_followed(server: Server, primary: Primary) -> None:
    primary.append(*live("jti", ["a"]))
    primary.beat()
    with mirroring(server) as mirror:
        reaches(mirror, primary.position)
        primary.open_epoch(9, NONCE_2)
        primary.append(*live("jti", ["b"]))
        primary.beat()
        reaches(mirror, f"9-1.{NONCE_2}")
        until(lambda: staleness(mirror).fresh, "fresh")
        assert holds(mirror, "a")
        assert mirror.counters["rereads"] == 0


# -- beats -----------------------------------------------------------------------------------------------------------


def test_a_beat_arrives_once_and_then_ages(server: Server, primary: Primary) -> None:
    primary.beat()
    with mirroring(server) as mirror:
        until(lambda: staleness(mirror).fresh, "fresh")
        first = mirror.view.freshness.confirmed
        read = mirror.view
        until(lambda: mirror.view is not read, "another round")
        assert mirror.view.freshness.confirmed is first
        primary.beat()
        until(lambda: mirror.view.freshness.confirmed is not first, "the next beat")


def test_unconfirmed_beats_are_an_age_and_not_freshness(server: Server, client: redis.Redis) -> None:
    primary = Primary(client)
    primary.beat(confirmed=False)
    with mirroring(server) as mirror:
        until(lambda: staleness(mirror).seconds is not None, "an age")
        assert staleness(mirror)[1:] == (False, "unconfirmed")


def test_a_beat_from_the_future_is_named_as_clock_skew(server: Server, primary: Primary) -> None:
    primary.beat(at=time.time() + 60)
    with mirroring(server) as mirror:
        until(lambda: staleness(mirror).reason == "clock_skew", "clock_skew")


def test_a_log_that_needs_a_newer_reader_is_named_and_still_read(server: Server, primary: Primary) -> None:
    primary.set_meta(min_reader_format="2")
    primary.append(*live("jti", ["a"]))
    primary.beat()
    with mirroring(server) as mirror:
        until(lambda: staleness(mirror).reason == "log_format_newer", "log_format_newer")
        assert holds(mirror, "a")


def test_a_malformed_beat_does_not_stop_the_entries(server: Server, primary: Primary, client: redis.Redis) -> None:
    with mirroring(server) as mirror:
        reaches(mirror, primary.position)
        client.hset(BEAT_KEY, mapping={"nonce": "nonsense"})
        primary.append(*live("jti", ["a"]))
        until(lambda: holds(mirror, "a"), "the entry")
        until(lambda: mirror.counters["beats_skipped"] > 0, "counted")
        primary.beat()
        until(lambda: staleness(mirror).fresh, "fresh")


# -- losing the server -----------------------------------------------------------------------------------------------


def test_a_killed_connection_is_resumed_from_the_position(
    server: Server, primary: Primary, client: redis.Redis
) -> None:
    primary.append(*live("jti", [f"t-{n}" for n in range(50)]))
    with mirroring(server) as mirror:
        reaches(mirror, primary.position)
        for round_ in range(3):
            command(client, "CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
            primary.append(*live("jti", [f"after-{round_}"]))
            until(lambda r=round_: holds(mirror, f"after-{r}"), "resumed")  # type: ignore[misc]
        reaches(mirror, primary.position)
        assert mirror.counters["disconnects"] >= 3
        assert mirror.counters["entries_read"] == 54  # each of them once
        assert mirror.counters["rereads"] == 0


def test_a_server_that_comes_back_with_its_log_is_resumed(run_dir: Path) -> None:
    with running(run_dir) as server:
        with server.client() as client:
            primary = Primary(client)
            primary.append(*live("jti", ["a"]))
        with mirroring(server) as mirror:
            reaches(mirror, primary.position)
            server.stop()
            until(lambda: mirror.view.problem is not None, "the loss is noticed")
            assert holds(mirror, "a")
            server.start()
            with server.client() as client:
                primary.client = client
                primary.append(*live("jti", ["b"]))
            reaches(mirror, primary.position)
            assert holds(mirror, "b")
            assert (mirror.counters["entries_read"], mirror.counters["rereads"]) == (3, 0)


def test_a_flushed_server_takes_nothing_from_the_mirror_which_goes_on_ageing(
    server: Server, primary: Primary, client: redis.Redis
) -> None:
    primary.append(*live("jti", ["a"]))
    primary.beat()
    with mirroring(server) as mirror:
        until(lambda: staleness(mirror).fresh, "fresh")
        client.flushall()
        until(lambda: mirror.view.problem == "no_trust_log", "named")
        assert holds(mirror, "a")
        age = staleness(mirror).seconds
        assert age is not None
        until(lambda: (staleness(mirror).seconds or 0) > age, "ageing")
        assert staleness(mirror, bound=0.0).reason == "stale"


@pytest.mark.parametrize("incarnation", ["first", "second"])
def test_a_log_that_was_emptied_and_refilled_is_read_again_and_united(
    server: Server, primary: Primary, client: redis.Redis, incarnation: str
) -> None:
    primary.append(*live("jti", ["a", "b", "c"]))
    with mirroring(server) as mirror:
        reaches(mirror, primary.position)
        with client.pipeline(transaction=True) as pipe:  # in one step: the mirror never sees it empty
            pipe.flushall()
            pipe.execute()
        refilled = Primary(client, number=5, nonce=NONCE_2, incarnation=incarnation)
        refilled.append(*live("jti", ["d"]))
        reaches(mirror, refilled.position)
        assert [holds(mirror, jti) for jti in "abcd"] == [True] * 4
        assert mirror.counters["rereads"] >= 1


def test_an_older_log_in_the_place_of_the_one_read_is_noticed(
    server: Server, primary: Primary, client: redis.Redis
) -> None:
    primary.append(*live("jti", ["a", "b", "c"]))
    with mirroring(server) as mirror:
        reaches(mirror, primary.position)
        primary.remove(2, 3)  # as after a restart from an old snapshot
        until(lambda: mirror.counters["reread_rewind"] > 0, "rewind")
        primary.seq = 1
        primary.open_epoch(2, NONCE_2)
        primary.append(*live("jti", ["d"]))
        reaches(mirror, primary.position)
        assert [holds(mirror, jti) for jti in "abcd"] == [True] * 4


def test_the_same_number_with_another_nonce_is_another_history(
    server: Server, primary: Primary, client: redis.Redis
) -> None:
    primary.append(*live("jti", ["a"]))
    with mirroring(server) as mirror:
        reaches(mirror, primary.position)
        with client.pipeline(transaction=True) as pipe:
            pipe.delete(LOG_KEY)
            pipe.execute()
        other = Primary(client, number=1, nonce=NONCE_2)
        other.append(*live("jti", ["b", "c", "d"]))
        reaches(mirror, other.position)
        assert [holds(mirror, jti) for jti in "abcd"] == [True] * 4


# -- holes -----------------------------------------------------------------------------------------------------------


def test_a_hole_is_read_again_then_tolerated_and_its_beats_are_not_counted(server: Server, primary: Primary) -> None:
    primary.append(*live("jti", [f"t-{n}" for n in range(1, 6)]))
    primary.remove(3)
    primary.beat()
    with mirroring(server) as mirror:
        reaches(mirror, primary.position)
        assert [holds(mirror, f"t-{n}") for n in range(1, 6)] == [True, True, False, True, True]
        assert mirror.counters["reread_hole"] == 1
        until(lambda: staleness(mirror).reason == "hole", "named")
        for _ in range(3):
            primary.beat()
            read = mirror.view
            until(lambda r=read: mirror.view is not r, "another round")  # type: ignore[misc]
        assert staleness(mirror) == (None, False, "hole")


def test_beats_do_not_count_on_the_way_over_a_hole_either(
    server: Server, primary: Primary, client: redis.Redis
) -> None:
    # The beat is heard while its position is not reached, and the read that reaches it finds the hole.
    primary.append(*live("jti", ["a"]))
    with mirroring(server) as mirror:
        reaches(mirror, primary.position)
        primary.seq += 3
        primary.beat()  # says 1-4, which is not there yet
        until(lambda: mirror.view.freshness.pending_confirmed is not None, "the beat is waiting")
        primary.seq -= 1
        primary.append(*live("jti", ["d"]))  # 1-4 without 1-2 and 1-3
        reaches(mirror, primary.position)
        assert mirror.view.freshness.confirmed is None
        assert not staleness(mirror).fresh


def test_a_hole_counts_until_the_next_epoch(server: Server, primary: Primary) -> None:
    primary.append(*live("jti", ["a", "b", "c"]))
    primary.remove(2)
    primary.beat()
    with mirroring(server) as mirror:
        until(lambda: staleness(mirror).reason == "hole", "named")
        primary.open_epoch(2, NONCE_2)  # the regions answer a hole with an epoch and add what they hold
        primary.append(*live("jti", ["b"]))
        primary.beat()
        until(lambda: staleness(mirror).fresh, "fresh again")
        assert [holds(mirror, jti) for jti in "abc"] == [True] * 3


def test_a_second_hole_is_read_again_like_the_first(server: Server, primary: Primary, client: redis.Redis) -> None:
    primary.append(*live("jti", ["a", "b", "c"]))
    primary.remove(2)
    with mirroring(server) as mirror:
        reaches(mirror, primary.position)
        rereads = mirror.counters["reread_hole"]
        primary.seq += 1
        primary.append(*live("jti", ["e"]))
        reaches(mirror, primary.position)
        assert mirror.counters["reread_hole"] == rereads + 1


def test_a_log_trimmed_on_purpose_has_no_hole(server: Server, primary: Primary, client: redis.Redis) -> None:
    primary.append(*live("jti", [f"t-{n}" for n in range(1, 10)]))
    with client.pipeline(transaction=True) as pipe:
        pipe.xtrim(LOG_KEY, minid="1-6", approximate=False)
        pipe.hset(META_KEY, "trimmed_to", "1-5")
        pipe.execute()
    primary.beat()
    with mirroring(server) as mirror:
        until(lambda: staleness(mirror).fresh, "fresh")
        assert mirror.counters["rereads"] == 0
        assert (holds(mirror, "t-5"), holds(mirror, "t-6")) == (False, True)
        with client.pipeline(transaction=True) as pipe:  # and once more while it is tailing
            pipe.xtrim(LOG_KEY, minid="1-8", approximate=False)
            pipe.hset(META_KEY, "trimmed_to", "1-7")
            pipe.execute()
        primary.append(*live("jti", ["last"]))
        until(lambda: holds(mirror, "last"), "tailing")
        assert mirror.counters["rereads"] == 0


def test_a_log_that_contradicts_itself_is_not_read_in_a_tight_loop(
    server: Server, primary: Primary, client: redis.Redis
) -> None:
    client.hset(EPOCH_KEY, mapping={"nonce": NONCE_2, "chain": "[]"})
    primary.append(*live("jti", ["a"]))
    with mirroring(server) as mirror:
        until(lambda: mirror.counters["rereads"] >= 3, "read again")
        before, over = mirror.counters["rereads"], time.monotonic() + 0.6
        until(lambda: time.monotonic() > over, "a while")
        assert mirror.counters["rereads"] - before <= 5  # rounds are of 20 ms here
        assert holds(mirror, "a")
        assert not staleness(mirror).fresh


# -- poison ----------------------------------------------------------------------------------------------------------


def test_a_poison_entry_is_skipped_and_counted(
    server: Server, primary: Primary, caplog: pytest.LogCaptureFixture
) -> None:
    primary.append(*live("jti", ["a"]))
    primary.append_raw({b"v": b"1", b"kind": b"\xff\xfe"})
    primary.append_raw({b"v": b"2", b"kind": b"tenant", b"id": b"x"})
    primary.append(*live("jti", ["b"]))
    primary.beat()
    with caplog.at_level(logging.ERROR), mirroring(server) as mirror:
        until(lambda: staleness(mirror).fresh, "fresh")
        assert (holds(mirror, "a"), holds(mirror, "b")) == (True, True)
        assert (mirror.counters["entries_skipped"], mirror.counters["rereads"]) == (2, 0)
    assert "format_newer" in caplog.text


# -- access ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("password", ["wrong", None])
def test_a_wrong_password_is_named_and_appears_nowhere(
    server: Server, primary: Primary, password: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    with mirroring(f"unix://{server.socket}", password=password) as mirror:
        until(lambda: mirror.view.problem == "wrong_credentials", "named")
        assert not mirror.wait_synced(0)
    assert "wrong_credentials" in caplog.text
    assert "wrong_credentials" not in repr(mirror)


def test_a_password_that_is_set_right_is_named_nowhere(
    server: Server, primary: Primary, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, logger="verifier"), mirroring(server) as mirror:
        reaches(mirror, primary.position)
        with server.client() as client:
            command(client, "CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        until(lambda: mirror.counters["disconnects"] > 0, "lost")
    assert PASSWORD not in caplog.text + repr(mirror) + repr(mirror.view)


def test_a_user_that_may_not_read_the_log_is_named(server: Server, primary: Primary, client: redis.Redis) -> None:
    command(client, "ACL", "SETUSER", "verifier", "on", ">pw", "~other:*", "+@all")
    try:
        with mirroring(f"unix://{server.socket}", username="verifier", password="pw") as mirror:
            until(lambda: mirror.view.problem == "no_permission", "named")
    finally:
        command(client, "ACL", "DELUSER", "verifier")


def test_reading_needs_no_more_than_reading(server: Server, primary: Primary, client: redis.Redis) -> None:
    command(
        client, "ACL", "SETUSER", "verifier", "on", ">pw", "~{trust}:*", "-@all", "+@read", "+multi", "+exec", "+ping"
    )
    try:
        primary.append(*live("jti", ["a"]))
        with mirroring(f"unix://{server.socket}", username="verifier", password="pw") as mirror:
            reaches(mirror, primary.position)
    finally:
        command(client, "ACL", "DELUSER", "verifier")


def test_a_server_that_is_not_there_is_named(run_dir: Path) -> None:
    with mirroring(f"unix://{run_dir}/nobody") as mirror:
        until(lambda: mirror.view.problem == "unreachable", "named")


def test_the_next_server_of_a_list_is_tried_and_read_from_the_start(
    server: Server, primary: Primary, run_dir: Path
) -> None:
    mirror = ReplicaMirror([f"unix://{run_dir}/nobody", server.url])
    primary.append(*live("jti", ["a"]))
    mirror.start()
    try:
        reaches(mirror, primary.position)
        assert holds(mirror, "a")
    finally:
        mirror.close()


# -- life ------------------------------------------------------------------------------------------------------------


def test_entries_applied_at_once_are_not_undone_by_the_log(server: Server, primary: Primary) -> None:
    with mirroring(server) as mirror:
        reaches(mirror, primary.position)
        mirror.apply_local(live("jti", ["local"]))
        assert holds(mirror, "local")
        primary.append(*live("jti", ["a"]))
        reaches(mirror, primary.position)
        assert holds(mirror, "local")


def test_a_closed_mirror_can_be_started_again_and_goes_on(server: Server, primary: Primary) -> None:
    with mirroring(server) as mirror:
        reaches(mirror, primary.position)
        mirror.close()
        assert mirror.view.connection == "closed"
        primary.append(*live("jti", ["a"]))
        mirror.start()
        mirror.start()  # once is enough
        reaches(mirror, primary.position)
        assert (holds(mirror, "a"), mirror.counters["entries_read"]) == (True, 2)


def test_expired_entries_are_dropped_by_the_beats_clock_and_the_local_one(
    server: Server, primary: Primary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("verifier.mirroring.DROP_EVERY_S", 0.0)
    now = int(time.time())
    primary.append(entry("jti", "over", expires_at=now - 400), entry("jti", "in-grace", expires_at=now - 200))
    with mirroring(server) as mirror:
        reaches(mirror, primary.position)
        primary.beat(at=now - 150)  # by this clock neither is past its end and the grace
        until(lambda: mirror.view.freshness.confirmed is not None, "the beat")
        read = mirror.view
        until(lambda: mirror.view is not read, "another round")
        assert holds(mirror, "over")
        primary.beat()
        until(lambda: not holds(mirror, "over"), "dropped")
        assert holds(mirror, "in-grace")


def test_a_mirror_closed_in_its_first_read_is_not_synced_when_started_again(
    server: Server, primary: Primary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("verifier.replica.READ_BATCH_ENTRIES", 10)
    primary.append(*live("jti", [f"t-{n}" for n in range(300)]))
    with mirroring(server, OnEntries(lambda _: time.sleep(0.002))) as mirror:
        until(lambda: mirror.counters["entries_read"] > 0, "reading")
        mirror.close()
        assert not mirror.view.freshness.synced
        assert mirror.view.snapshot.entries < 300
        mirror.start()
        assert mirror.wait_synced(10)
        assert holds(mirror, "t-299")


def test_an_entry_beside_an_unreadable_id_is_applied_once_the_log_is_repaired(
    server: Server, primary: Primary, client: redis.Redis
) -> None:
    with mirroring(server) as mirror:
        reaches(mirror, primary.position)
        with client.pipeline(transaction=True) as pipe:
            pipe.xadd(LOG_KEY, live("jti", ["beside"])[0].encode(), id="1-1")  # type: ignore[arg-type]
            pipe.xadd(LOG_KEY, {"v": "1"}, id="99999999999999999-0")
            pipe.execute()
        until(lambda: mirror.view.problem in ("log_stream_id", "format"), "the problem is named")
        client.xdel(LOG_KEY, "99999999999999999-0")
        until(lambda: mirror.view.problem is None and holds(mirror, "beside"), "applied")


def test_a_verifier_of_tokens_that_outlive_their_revocations_is_not_fresh_by_name(
    server: Server, primary: Primary
) -> None:
    primary.beat()
    with (
        mirroring(server, max_token_lifetime_s=86_401) as longer,
        mirroring(server, max_token_lifetime_s=86_400) as same,
    ):
        until(lambda: staleness(same).fresh, "fresh")
        until(lambda: staleness(longer).reason == "max_token_lifetime", "named")
