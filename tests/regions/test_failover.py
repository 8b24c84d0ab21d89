"""Deaths, returns and planned failovers on real servers and real Sentinels."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from regions.embedded import observe_replication
from regions.errors import AlreadyPrimary, FailoverUnknown, NoSentinel, NotReady, ReplicaDown, UnknownRegion
from regions.failover import Failover, connect, connect_sentinel
from regions.sentinel_config import GROUP
from regions.sentinels import ask
from regions.status import read_status, status_doubts, status_lines
from tests.regions.sentinel_lab import TWO_REGIONS, Lab, running_lab, until
from verifier.sentinel import ServerSeen, read_replicas

KEY = "{ks}:test"


@pytest.fixture
def lab(run_dir: Path) -> Iterator[Lab]:
    with running_lab(run_dir) as running:
        yield running
        running._nursery.check()
        assert set(running.link.counters().unbound.values()) == {0}


class Tempter:
    """Somebody who tries to write to one region's server, and looks at its role, all the time."""

    def __init__(self, lab: Lab, region: str, caller: str) -> None:
        self._lab, self._region, self._caller = lab, region, lab.topology.region(caller).address
        self.accepted: list[float] = []
        self.roles: set[object] = set()
        self.tries = 0
        self._stop = threading.Event()

    @contextlib.contextmanager
    def trying(self) -> Iterator[None]:
        threads = [threading.Thread(target=target, daemon=True) for target in (self._write, self._watch)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._stop.set()
            for thread in threads:
                thread.join()

    def _write(self) -> None:
        while not self._stop.is_set():
            with (
                contextlib.suppress(redis.RedisError, OSError),
                contextlib.closing(connect(self._lab.url(self._region), self._caller, timeout_s=0.5)) as client,
            ):
                client.set(KEY, "by the zombie")
                self.accepted.append(time.monotonic())
            self.tries += 1
            self._stop.wait(0.002)

    def _watch(self) -> None:
        while not self._stop.is_set():
            self.roles.add(observe_replication(self._lab.servers[self._region]).get("role"))
            self._stop.wait(0.002)


def write(lab: Lab, region: str, value: str) -> None:
    with contextlib.closing(connect(lab.url(region), lab.topology.region(region).address)) as client:
        client.set(KEY, value)


def read(lab: Lab, region: str) -> object:
    with contextlib.closing(connect(lab.url(region), lab.topology.region(region).address)) as client:
        return client.get(KEY)


def test_a_region_that_dies_and_returns_is_a_replica_and_never_takes_a_write(lab: Lab) -> None:
    write(lab, "a", "before")
    until(lambda: read(lab, "b") == read(lab, "c") == b"before", "replicated")
    lab.kill_region("a")
    primary = lab.await_primary("a")
    assert primary in ("b", "c")
    write(lab, primary, "after")
    tempter = Tempter(lab, "a", caller=primary)
    with tempter.trying():
        lab.return_region("a")
        tried = tempter.tries
        until(lambda: tempter.tries > tried + 3, "tries after the return")
    assert tempter.accepted == []
    assert "slave" in tempter.roles
    assert "master" not in tempter.roles
    until(lambda: read(lab, "a") == b"after", "the returned region has caught up")
    assert lab.primary() == primary


def test_a_server_that_returns_by_itself_would_take_writes(lab: Lab) -> None:
    """What the fence prevents: without it the test above could not fail."""
    lab.kill_server("a")
    primary = lab.await_primary("a")
    tempter = Tempter(lab, "a", caller=primary)
    with tempter.trying():
        lab.restart_server_unfenced("a")
        until(lambda: tempter.accepted, "a write to the zombie")
    assert "master" in tempter.roles


@pytest.mark.slow
def test_a_primary_that_is_started_again_at_once_waits_until_another_is_promoted(lab: Lab) -> None:
    write(lab, "a", "before")
    until(lambda: read(lab, "b") == read(lab, "c") == b"before", "replicated")
    lab.kill_server("a")
    tempter = Tempter(lab, "a", caller="b")
    with tempter.trying():
        lab.restart_server("a")
    assert tempter.accepted == []
    assert "master" not in tempter.roles
    assert lab.primary() in ("b", "c")
    assert read(lab, "a") == b"before"


@pytest.mark.parametrize("coordinate", [True, False], ids=["coordinated", "held"])
def test_a_planned_failover_loses_no_write_that_was_acknowledged(lab: Lab, coordinate: bool) -> None:
    report = Failover(lab.file(), "c", timeout_s=60, coordinate=coordinate).run()
    assert (report.was, report.now, report.lost) == ("a", "c", 0)
    assert report.how == ("coordinated" if coordinate else "held")
    assert report.acknowledged > 10
    assert report.writes_away_ms > 0
    assert lab.primary() == "c"
    write(lab, "c", "after")
    until(lambda: read(lab, "a") == read(lab, "b") == b"after", "the others follow")
    with pytest.raises(redis.ReadOnlyError):
        write(lab, "a", "to the old primary")


@pytest.mark.slow
def test_a_failover_that_cannot_be_is_refused_by_name_and_changes_nothing(lab: Lab) -> None:
    with pytest.raises(UnknownRegion, match="a, b, c"):
        Failover(lab.file(), "nowhere")
    with pytest.raises(AlreadyPrimary):
        Failover(lab.file(), "a").run()
    lab.kill_server("b")
    until(lambda: any("s_down" in replica.flags for replica in replicas_of(lab, "c")), "b is seen as down")
    with pytest.raises(ReplicaDown):
        Failover(lab.file(), "b").run()
    assert lab.primary() == "a"


def test_a_failover_whose_end_is_not_seen_has_an_unknown_outcome_and_keeps_what_was_written(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    failover = Failover(lab.file(), "b")
    monkeypatch.setattr(failover, "_timeout_s", 0.0)
    write(lab, "a", "before")
    with pytest.raises(FailoverUnknown, match="regions status"):
        failover.run()
    primary = str(until(lab.primary, "settled again"))
    assert read(lab, primary) == b"before"


def test_status_tells_roles_links_and_what_each_sentinel_says(lab: Lab) -> None:
    found = {seen.region: seen for seen in read_status(lab.file())}
    assert {name: seen.role for name, seen in found.items()} == {"a": "primary", "b": "replica", "c": "replica"}
    assert {seen.sentinel for seen in found.values()} == {"a"}
    assert (found["b"].follows, found["b"].link) == ("a", "up")
    assert status_doubts(list(found.values())) == []
    assert status_lines(list(found.values()))[1].split() == ["a", "primary", "-", "-", "a"]
    lab.kill_server("c")
    lab.kill_sentinel("c")
    gone = read_status(lab.file())[2]
    assert (gone.role, gone.sentinel) == ("down", "down")


def replicas_of(lab: Lab, sentinel: str) -> list[ServerSeen]:
    with contextlib.closing(connect_sentinel(lab.file().regions[sentinel])) as client:
        return read_replicas(ask(client, "REPLICAS", GROUP))


@pytest.mark.slow
def test_a_minority_of_the_sentinels_may_be_gone(lab: Lab) -> None:
    lab.kill_sentinel("b")
    lab.kill_server("a")
    assert lab.await_primary("a") in ("b", "c")
    lab.return_sentinel("b")
    assert len({seen.primary.address for seen in lab.sentinels.sightings()}) == 1


@pytest.mark.slow
def test_without_a_majority_of_the_sentinels_nothing_is_promoted(lab: Lab) -> None:
    lab.kill_sentinel("b")
    lab.kill_sentinel("c")
    lab.kill_server("a")
    until(lambda: "s_down" in lab.sentinels.sightings()[0].primary.flags, "the death is seen")
    assert lab.primary() is None
    assert observe_replication(lab.servers["b"])["role"] == observe_replication(lab.servers["c"])["role"] == "slave"
    lab.return_sentinel("b")  # with it there is a majority
    assert lab.primary() in ("b", "c")


@pytest.mark.slow
def test_with_no_sentinel_a_failover_is_refused_by_name(lab: Lab) -> None:
    for region in ("a", "b", "c"):
        lab.kill_sentinel(region)
    with pytest.raises(NoSentinel):
        Failover(lab.file(), "b").run()
    write(lab, "a", "goes on")


@pytest.mark.slow
def test_two_deaths_in_a_row_and_everything_is_there_again(lab: Lab) -> None:
    for round_ in range(2):
        dead = str(until(lab.primary, "a primary"))
        write(lab, dead, f"round {round_}")
        others = [region.name for region in lab.topology.regions if region.name != dead]
        until(lambda others=others, n=round_: {read(lab, r) for r in others} == {f"round {n}".encode()}, "replicated")  # type: ignore[misc]
        lab.kill_region(dead)
        lab.await_primary(dead)
        lab.return_region(dead)
    assert [read(lab, region.name) for region in lab.topology.regions] == [b"round 1"] * 3


@pytest.mark.slow
def test_of_two_regions_the_one_that_is_left_promotes_nothing_and_a_return_heals_it(run_dir: Path) -> None:
    with running_lab(run_dir, TWO_REGIONS) as lab:
        assert Failover(lab.file(), "b").run().lost == 0
        lab.kill_region("b")
        until(lambda: lab.sentinels.sightings()[0].primary.flags >= {"s_down"}, "the death is seen")
        assert observe_replication(lab.servers["a"])["role"] == "slave"
        lab.return_region("b")
        assert lab.primary() == "a"
        assert observe_replication(lab.servers["b"])["role"] == "slave"


@pytest.mark.slow
def test_with_nobody_to_follow_a_server_stays_behind_its_closed_address(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("regions.deaths.RETURN_WITHIN_S", 5.0)
    for region in ("a", "b", "c"):
        lab.kill_server(region)
    with pytest.raises(NotReady, match="have not settled"):
        lab.restart_server("a")
    with pytest.raises(redis.ConnectionError):
        write(lab, "a", "anything")
