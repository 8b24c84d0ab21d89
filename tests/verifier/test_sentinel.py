"""A verifier that finds its server through Sentinels: the URL, the choice, and real ones."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from regions.failover import connect, open_client
from tests.regions.sentinel_lab import Lab, running_lab, until
from tests.verifier.support import entry
from tests.verifier.valkey import Primary
from verifier import ConfigurationError
from verifier.replica import ReplicaMirror
from verifier.sentinel import (
    Address,
    SentinelUrl,
    ServerSeen,
    is_sentinel_url,
    nodes_in_order,
    parse_sentinel_url,
    read_replicas,
    read_sighting,
)

A, B, C = (Address(f"127.0.{n}.1", 6379) for n in (1, 2, 3))


# -- the URL --------------------------------------------------------------------------------------------------------


def test_a_sentinel_url_names_sentinels_a_group_and_the_sentinels_user() -> None:
    assert parse_sentinel_url("redis+sentinel://h1:1,h2/trust") == SentinelUrl(
        (Address("h1", 1), Address("h2", 26_379)), "trust"
    )
    full = parse_sentinel_url("rediss+sentinel://me:p%40ss@[::1]:5,[fe80::2]/my%20group")
    assert full == SentinelUrl((Address("::1", 5), Address("fe80::2", 26_379)), "my group", True, "me", "p@ss")
    assert "p@ss" not in repr(full)
    assert str(full.sentinels[0]) == "[::1]:5"


def test_other_urls_are_no_sentinel_urls() -> None:
    assert is_sentinel_url("redis+sentinel://h/g")
    assert not is_sentinel_url("redis://h:1")


@pytest.mark.parametrize(
    "url",
    [
        "redis+sentinel://secret@h",  # no group
        "redis+sentinel://secret@h/",
        "redis+sentinel://secret@h/a/b",
        "redis+sentinel://secret@h/a?b",
        "redis+sentinel:///group",
        "redis+sentinel://secret@h:0/g",
        "redis+sentinel://secret@h:65536/g",
        "redis+sentinel://secret@h:x/g",
        "redis+sentinel://secret@h,,i/g",
        "redis+sentinel://secret@[::1]x/g",
        "redis://secret@h/g",
    ],
)
def test_a_broken_sentinel_url_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(ValueError, match=r"^(is not|has a)") as refused:
        parse_sentinel_url(url)
    assert "secret" not in str(refused.value)


def test_the_verifier_names_the_setting_of_a_broken_url() -> None:
    with pytest.raises(ConfigurationError, match="redis_url: expected redis") as refused:
        ReplicaMirror("redis+sentinel://me:secret@h:x/g")
    assert "secret" not in str(refused.value)


# -- what Sentinels answer, and the choice ----------------------------------------------------------------------------


def test_answers_are_read_alike_as_lists_and_as_maps() -> None:
    pairs = [b"flags", b"master,s_down", b"config-epoch", b"7"]
    as_list = read_sighting(pairs, [b"127.0.1.1", b"6379"])
    as_map = read_sighting(dict(zip(pairs[::2], pairs[1::2], strict=True)), ["127.0.1.1", "6379"])
    assert as_list == as_map
    assert as_list is not None
    assert (as_list.primary.address, as_list.primary.sound, as_list.config_epoch) == (A, False, 7)
    assert read_sighting([], None) is None


def test_a_replica_is_sound_if_it_is_reached_and_its_link_is_up() -> None:
    def one(flags: str, link: str) -> ServerSeen:
        return read_replicas([["ip", "h", "port", "1", "flags", flags, "master-link-status", link]])[0]

    assert one("slave", "ok").sound
    assert not one("slave,s_down", "ok").sound
    assert not one("slave,disconnected", "ok").sound
    assert not one("slave", "err").sound


def seen(address: Address, *flags: str) -> ServerSeen:
    return ServerSeen(address, frozenset(flags))


def test_the_own_regions_server_comes_first_whatever_it_is() -> None:
    rng = random.Random(1)
    assert nodes_in_order(B.host, seen(A), [seen(C), seen(B)], rng)[0] == B
    assert nodes_in_order(A.host, seen(A), [seen(C), seen(B)], rng)[0] == A


def test_without_the_own_one_replicas_are_spread_and_the_primary_is_last() -> None:
    found = {tuple(nodes_in_order("elsewhere", seen(A), [seen(B), seen(C)], random.Random(n))) for n in range(20)}
    assert found == {(B, C, A), (C, B, A)}


def test_an_unsound_replica_is_not_chosen_and_the_primary_remains() -> None:
    assert nodes_in_order(B.host, seen(A), [seen(B, "s_down")], random.Random(1)) == [A]


# -- real Sentinels ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with tempfile.TemporaryDirectory(prefix="vs-") as path, running_lab(Path(path)) as running:
        yield running


def server_of(mirror: ReplicaMirror) -> str:
    """The host that the mirror reads."""
    return str(mirror._server[0])  # type: ignore[index]  # a tuple, but nobody's business elsewhere


def test_a_mirror_finds_its_own_regions_server_and_another_when_that_is_gone(lab: Lab) -> None:
    home = lab.topology.region("b")
    with connect(lab.url("a"), lab.topology.region("a").address) as client:
        log = Primary(client)
        log.append(entry("jti", "one", id="one"))
        mirror = ReplicaMirror(
            lab.sentinel_url("b", "watcher"),
            username="verifier",
            password=lab.passwords["verifier"],
            source_address=home.address,
        )
        mirror.start()
        try:
            assert mirror.wait_synced(60)
            assert server_of(mirror) == home.address
            lab.kill_server("b")
            log.append(entry("jti", "two", id="two"))
            until(lambda: mirror.snapshot.entries == 2, "it reads on elsewhere")
            assert server_of(mirror) in {lab.topology.region("a").address, lab.topology.region("c").address}
            assert mirror.counters["rereads"] == 0
        finally:
            mirror.close()
    lab.restart_server("b")
    assert set(lab.link.counters().unbound.values()) == {0}


def test_a_wrong_sentinel_password_is_named(lab: Lab) -> None:
    url = lab.sentinel_url("b", "watcher").replace(lab.sentinels.credentials.watcher, "wrong")
    mirror = ReplicaMirror(url, username="verifier", password="x", source_address="127.0.2.1")
    mirror.start()
    try:
        until(lambda: mirror.view.problem == "wrong_credentials", "it says so")
    finally:
        mirror.close()


def test_the_watcher_may_ask_and_nothing_else(lab: Lab) -> None:
    place = lab.topology.region("b").address
    address = Address(place, lab.topology.ports["sentinel"])
    watcher = open_client(address, "watcher", lab.sentinels.credentials.watcher, place, 2.0)
    with watcher:
        for command in (["SENTINEL", "FAILOVER", "trust"], ["SENTINEL", "REMOVE", "trust"], ["PUBLISH", "x", "y"]):
            with pytest.raises(redis.exceptions.NoPermissionError):
                watcher.execute_command(*command)  # type: ignore[no-untyped-call]
