"""Mirrors against a real server, over Redis and over the feed: nothing held is ever lost, and every gap is noticed."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import pytest
import redis

from tests.verifier.mirrors import (
    Mirroring,
    OnEntries,
    client,
    holds,
    mirroring,
    module_dir,
    primary,
    reaches,
    server,
    shared_server,
    short_rounds,
    staleness,
)
from tests.verifier.support import NONCE, NONCE_2, entry, until
from tests.verifier.valkey import Primary, Server, command, live, running
from verifier.log import BEAT_KEY, EPOCH_KEY, LOG_KEY, META_KEY

__all__ = ["client", "mirroring", "module_dir", "primary", "server", "shared_server", "short_rounds"]

# -- reading ---------------------------------------------------------------------------------------------------------


def test_the_first_read_brings_everything_and_the_tail_what_follows(
    mirroring: Mirroring, server: Server, primary: Primary
) -> None:
    primary.append(*live("jti", ["a", "b"]), *live("sub", ["ada"]))
    primary.beat()
    with mirroring(server) as mirror:
        assert mirror.wait_synced(60)
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


def test_ten_thousand_entries_are_read_at_once(mirroring: Mirroring, server: Server, primary: Primary) -> None:
    primary.append(*live("jti", [f"t-{n}" for n in range(10_000)]))
    primary.beat()
    with mirroring(server) as mirror:
        assert mirror.wait_synced(60)
        assert mirror.view.snapshot.entries == 10_000
        assert str(mirror.view.position) == primary.position
        assert mirror.counters["entries_read"] == 10_001
        assert mirror.counters["rereads"] == 0
        assert all(holds(mirror, f"t-{n}") for n in range(0, 10_000, 97))


@pytest.mark.parametrize("count", [999, 1000, 1001])
def test_a_log_about_as_long_as_a_batch_is_read_whole(
    mirroring: Mirroring, server: Server, primary: Primary, count: int
) -> None:
    primary.append(*live("jti", [f"t-{n}" for n in range(count - 1)]))
    with mirroring(server) as mirror:
        assert mirror.wait_synced(60)
        assert (mirror.view.snapshot.entries, mirror.counters["rereads"]) == (count - 1, 0)


def test_a_log_that_appears_later_is_waited_for(mirroring: Mirroring, server: Server, client: redis.Redis) -> None:
    with mirroring(server) as mirror:
        until(lambda: mirror.view.problem == "no_trust_log", "the empty server is named")
        assert not mirror.wait_synced(0)
        primary = Primary(client)
        assert mirror.wait_synced(60)
        reaches(mirror, primary.position)


def test_entries_are_handed_on_in_order_with_their_positions(
    mirroring: Mirroring, server: Server, primary: Primary
) -> None:
    seen: list[str] = []
    with mirroring(server, OnEntries(lambda batch: seen.extend(f"{p}={e.value}" for p, e in batch))) as mirror:
        reaches(mirror, primary.position)
        primary.append(*live("jti", ["a", "b"]))
        reaches(mirror, primary.position)
    assert seen[1:] == [f"1-1.{NONCE}=a", f"1-2.{NONCE}=b"]


def test_a_new_epoch_is_followed(mirroring: Mirroring, server: Server, primary: Primary) -> None:
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


def test_a_beat_arrives_once_and_then_ages(mirroring: Mirroring, server: Server, primary: Primary) -> None:
    primary.beat()
    with mirroring(server) as mirror:
        until(lambda: staleness(mirror).fresh, "fresh")
        first = mirror.view.freshness.confirmed
        read = mirror.view
        until(lambda: mirror.view is not read, "another round")
        assert mirror.view.freshness.confirmed is first
        primary.beat()
        until(lambda: mirror.view.freshness.confirmed is not first, "the next beat")


def test_unconfirmed_beats_are_an_age_and_not_freshness(
    mirroring: Mirroring, server: Server, client: redis.Redis
) -> None:
    primary = Primary(client)
    primary.beat(confirmed=False)
    with mirroring(server) as mirror:
        until(lambda: staleness(mirror).seconds is not None, "an age")
        assert staleness(mirror)[1:] == (False, "unconfirmed")


def test_a_beat_from_the_future_is_named_as_clock_skew(mirroring: Mirroring, server: Server, primary: Primary) -> None:
    primary.beat(at=time.time() + 60)
    with mirroring(server) as mirror:
        until(lambda: staleness(mirror).reason == "clock_skew", "clock_skew")


def test_a_log_that_needs_a_newer_reader_is_named_and_still_read(
    mirroring: Mirroring, server: Server, primary: Primary
) -> None:
    primary.set_meta(min_reader_format="2")
    primary.append(*live("jti", ["a"]))
    primary.beat()
    with mirroring(server) as mirror:
        until(lambda: staleness(mirror).reason == "log_format_newer", "log_format_newer")
        assert holds(mirror, "a")


def test_a_malformed_beat_does_not_stop_the_entries(
    mirroring: Mirroring, server: Server, primary: Primary, client: redis.Redis
) -> None:
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
    mirroring: Mirroring, server: Server, primary: Primary, client: redis.Redis
) -> None:
    primary.append(*live("jti", [f"t-{n}" for n in range(50)]))
    with mirroring(server) as mirror:
        reaches(mirror, primary.position)
        for round_ in range(3):
            command(client, "CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
            primary.append(*live("jti", [f"after-{round_}"]))
            until(lambda r=round_: holds(mirror, f"after-{r}"), "resumed")  # type: ignore[misc]
        reaches(mirror, primary.position)
        assert mirror.counters["disconnects"] >= 1
        assert mirror.counters["entries_read"] == 54  # each of them once
        assert mirror.counters["rereads"] == 0


def test_a_server_that_comes_back_with_its_log_is_resumed(mirroring: Mirroring, run_dir: Path) -> None:
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
    mirroring: Mirroring, server: Server, primary: Primary, client: redis.Redis
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
    mirroring: Mirroring, server: Server, primary: Primary, client: redis.Redis, incarnation: str
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
    mirroring: Mirroring, server: Server, primary: Primary, client: redis.Redis
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
    mirroring: Mirroring, server: Server, primary: Primary, client: redis.Redis
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


def test_a_hole_is_read_again_then_tolerated_and_its_beats_are_not_counted(
    mirroring: Mirroring, server: Server, primary: Primary
) -> None:
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
    mirroring: Mirroring, server: Server, primary: Primary, client: redis.Redis
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


def test_a_hole_counts_until_the_next_epoch(mirroring: Mirroring, server: Server, primary: Primary) -> None:
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


def test_a_second_hole_is_read_again_like_the_first(
    mirroring: Mirroring, server: Server, primary: Primary, client: redis.Redis
) -> None:
    primary.append(*live("jti", ["a", "b", "c"]))
    primary.remove(2)
    with mirroring(server) as mirror:
        reaches(mirror, primary.position)
        rereads = mirror.counters["reread_hole"]
        primary.seq += 1
        primary.append(*live("jti", ["e"]))
        reaches(mirror, primary.position)
        assert mirror.counters["reread_hole"] == rereads + 1


def test_a_log_trimmed_on_purpose_has_no_hole(
    mirroring: Mirroring, server: Server, primary: Primary, client: redis.Redis
) -> None:
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
    mirroring: Mirroring, server: Server, primary: Primary, client: redis.Redis
) -> None:
    client.hset(EPOCH_KEY, mapping={"nonce": NONCE_2, "chain": "[]"})
    primary.append(*live("jti", ["a"]))
    with mirroring(server) as mirror:
        until(lambda: mirror.counters["rereads"] >= 3, "read again")
        began, before = time.monotonic(), mirror.counters["rereads"]
        until(lambda: time.monotonic() > began + 0.6, "a while")
        rereads, took_s = mirror.counters["rereads"] - before, time.monotonic() - began
        assert rereads <= 5 * took_s / 0.6  # rounds are of 20 ms here
        assert holds(mirror, "a")
        assert not staleness(mirror).fresh


# -- poison ----------------------------------------------------------------------------------------------------------


def test_a_poison_entry_is_skipped_and_counted(
    mirroring: Mirroring, server: Server, primary: Primary, caplog: pytest.LogCaptureFixture
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


# -- life ------------------------------------------------------------------------------------------------------------


def test_entries_applied_at_once_are_not_undone_by_the_log(
    mirroring: Mirroring, server: Server, primary: Primary
) -> None:
    with mirroring(server) as mirror:
        reaches(mirror, primary.position)
        mirror.apply_local(live("jti", ["local"]))
        assert holds(mirror, "local")
        primary.append(*live("jti", ["a"]))
        reaches(mirror, primary.position)
        assert holds(mirror, "local")


def test_a_closed_mirror_can_be_started_again_and_goes_on(
    mirroring: Mirroring, server: Server, primary: Primary
) -> None:
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
    mirroring: Mirroring, server: Server, primary: Primary, monkeypatch: pytest.MonkeyPatch
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


def test_many_expired_entries_are_dropped_in_many_rounds(
    mirroring: Mirroring, server: Server, primary: Primary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("verifier.mirroring.DROP_BUCKETS", 20)
    past = int(time.time()) - 4_000
    primary.append(*(entry("jti", f"over-{n}", expires_at=past) for n in range(1_000)))
    primary.append(*live("jti", [f"live-{n}" for n in range(1_000)]))
    with mirroring(server) as mirror:
        until(lambda: mirror.view.snapshot.entries == 2_000, "read")

        def left(at_most: int) -> bool:
            primary.beat()  # as time goes on: nothing is dropped on an old one's word
            return mirror.view.snapshot.entries <= at_most

        until(lambda: left(1_999), "begun")
        until(lambda: left(1_000), "all of them, without waiting for the next time")
        assert mirror.view.snapshot.entries == 1_000
        assert all(holds(mirror, f"live-{n}") for n in range(1_000))


def test_an_entry_beside_an_unreadable_id_is_applied_once_the_log_is_repaired(
    mirroring: Mirroring, server: Server, primary: Primary, client: redis.Redis
) -> None:
    with mirroring(server) as mirror:
        reaches(mirror, primary.position)
        with client.pipeline(transaction=True) as pipe:
            pipe.xadd(LOG_KEY, live("jti", ["beside"])[0].encode(), id="1-1")  # type: ignore[arg-type]
            pipe.xadd(LOG_KEY, {"v": "1"}, id="99999999999999999-0")
            pipe.execute()
        until(lambda: mirror.view.problem in ("log_stream_id", "format", "log_unreadable"), "the problem is named")
        client.xdel(LOG_KEY, "99999999999999999-0")
        until(lambda: mirror.view.problem is None and holds(mirror, "beside"), "applied")


def test_a_verifier_of_tokens_that_outlive_their_revocations_is_not_fresh_by_name(
    mirroring: Mirroring, server: Server, primary: Primary
) -> None:
    primary.beat()
    with (
        mirroring(server, max_token_lifetime_s=86_401) as longer,
        mirroring(server, max_token_lifetime_s=86_400) as same,
    ):
        until(lambda: staleness(same).fresh, "fresh")
        until(lambda: staleness(longer).reason == "max_token_lifetime", "named")
