"""The text of a Sentinel's configuration and access rules."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import pytest

from regions.sentinel_config import (
    SentinelCredentials,
    down_after_ms,
    new_ids,
    quorum,
    sentinel_acl_text,
    sentinel_config_text,
    sentinel_regions,
)
from regions.server_config import ServerVersion
from regions.topology import load_topology

VALKEY = ServerVersion("valkey", (9, 1, 2))
TOPOLOGY = load_topology("default")
US, EU, AP = TOPOLOGY.regions
CREDENTIALS = SentinelCredentials.generate()
IDS = new_ids(TOPOLOGY)


def lines() -> list[str]:
    return sentinel_config_text(
        EU,
        data_dir=Path("/var/data"),
        acl_path=Path("/var/users.acl"),
        uds=Path("/run/sentinel-2.sock"),
        server_password="of the servers",
        credentials=CREDENTIALS,
        topology=TOPOLOGY,
        ids=IDS,
        primary=US,
    ).splitlines()


@pytest.mark.parametrize(("sentinels", "wanted"), [(1, 1), (2, 2), (3, 2), (4, 3), (5, 3)])
def test_no_minority_and_no_half_of_the_sentinels_can_call_a_primary_dead(sentinels: int, wanted: int) -> None:
    assert quorum(sentinels) == wanted


def test_no_two_of_three_sentinels_lose_patience_within_a_ping_and_half_a_round_trip() -> None:
    waits = [down_after_ms(index, 3) for index in (1, 2, 3)]
    assert waits == [1_500, 1_900, 2_300]
    assert min(b - a for a, b in pairwise(waits)) > 200 + 90


def test_the_last_of_many_waits_at_most_800_ms_longer_than_the_first() -> None:
    assert down_after_ms(16, 16) <= down_after_ms(1, 16) + 800
    assert down_after_ms(2, 2) == 1_900


def test_every_region_has_a_sentinel_but_one_that_is_alone() -> None:
    assert sentinel_regions(TOPOLOGY) == TOPOLOGY.regions
    assert sentinel_regions(load_topology("one-region")) == ()


def test_a_sentinel_listens_on_a_unix_socket_only_and_calls_from_its_region() -> None:
    for line in ('port "0"', 'unixsocket "/run/sentinel-2.sock"', 'bind-source-addr "127.0.2.1"'):
        assert line in lines()


def test_what_it_announces_and_its_own_user_stand_before_what_it_monitors() -> None:
    found = lines()
    (monitor,) = [n for n, line in enumerate(found) if line.startswith('sentinel "monitor"')]
    for word in ("announce-ip", "announce-port", "sentinel-user", "sentinel-pass", "myid"):
        (place,) = [n for n, line in enumerate(found) if line.startswith(f'sentinel "{word}"')]
        assert place < monitor
    assert found[monitor] == 'sentinel "monitor" "trust" "127.0.1.1" "16379" "2"'


def test_it_knows_every_replica_and_every_other_sentinel_from_the_start() -> None:
    known = [line for line in lines() if '"known-' in line]
    assert known == [
        'sentinel "known-replica" "trust" "127.0.2.1" "16379"',
        'sentinel "known-replica" "trust" "127.0.3.1" "16379"',
        f'sentinel "known-sentinel" "trust" "127.0.1.1" "16380" "{IDS[US.name]}"',
        f'sentinel "known-sentinel" "trust" "127.0.3.1" "16380" "{IDS[AP.name]}"',
    ]


def test_each_user_may_do_its_part_and_no_other() -> None:
    rules = {line.split()[1]: set(line.split()) for line in sentinel_acl_text(CREDENTIALS, VALKEY).splitlines()}
    assert rules["default"] == {"user", "default", "reset", "off"}
    assert all({"reset", "resetchannels", "-@all"} <= rules[user] for user in asdict(CREDENTIALS))
    assert {user for user in rules if "+sentinel|failover" in rules[user]} == {"operator"}
    assert {user for user in rules if "+sentinel|is-master-down-by-addr" in rules[user]} == {"peer"}
    assert {user for user in rules if "+publish" in rules[user]} == {"peer"}


def test_access_rules_hold_hashes_and_no_password_and_repr_hides_them() -> None:
    text = sentinel_acl_text(CREDENTIALS, VALKEY)
    for password in asdict(CREDENTIALS).values():
        assert password not in text + repr(CREDENTIALS)
        assert hashlib.sha256(password.encode()).hexdigest() in text


def test_client_setinfo_is_named_only_to_a_server_that_knows_it() -> None:
    assert "+client|setinfo" in sentinel_acl_text(CREDENTIALS, VALKEY)
    assert "+client|setinfo" not in sentinel_acl_text(CREDENTIALS, ServerVersion("redis", (7, 0, 15)))
