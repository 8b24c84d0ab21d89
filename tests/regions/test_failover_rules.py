"""On whom the Sentinels are settled, who may be promoted, and when a returned server is let in."""

from __future__ import annotations

from typing import Any

import pytest

from regions.errors import AlreadyPrimary, FailoverError, NotAReplica, PrimaryDown, ReplicaDown
from regions.failover_rules import check_target, not_following, settled_primary
from verifier.sentinel import Address, ServerSeen, Sighting

A, B, C = (Address(f"127.0.{n}.1", 6379) for n in (1, 2, 3))


def named(address: Address, epoch: int, *flags: str) -> Sighting:
    return Sighting(ServerSeen(address, frozenset({"master", *flags})), epoch)


def test_a_majority_of_one_mind_settles_it() -> None:
    assert settled_primary([named(A, 1), named(A, 1)], 3) == A
    assert settled_primary([named(A, 1)], 3) is None


def test_half_of_the_sentinels_settle_nothing() -> None:
    assert settled_primary([named(A, 1)], 2) is None
    assert settled_primary([named(A, 1), named(A, 1)], 4) is None


def test_a_newer_epoch_is_not_settled_before_a_majority_is_in_it() -> None:
    assert settled_primary([named(A, 1), named(A, 1), named(B, 2)], 3) is None
    assert settled_primary([named(A, 1), named(B, 2), named(B, 2)], 3) == B


@pytest.mark.parametrize("doubt", ["s_down", "o_down", "failover_in_progress", "disconnected"])
def test_a_sentinel_in_doubt_does_not_count(doubt: str) -> None:
    assert settled_primary([named(A, 1), named(A, 1), named(A, 1, doubt)], 3) == A
    assert settled_primary([named(A, 1), named(A, 1, doubt)], 3) is None


def test_nobody_asked_settles_nothing() -> None:
    assert settled_primary([], 3) is None


def replica(address: Address, *flags: str, link_ok: bool = True) -> ServerSeen:
    return ServerSeen(address, frozenset({"slave", *flags}), link_ok)


PRIMARY = named(A, 1).primary


def test_a_replica_in_sync_can_be_promoted() -> None:
    check_target(B, "b", PRIMARY, [replica(C), replica(B)])


@pytest.mark.parametrize(
    ("target", "primary", "replicas", "error"),
    [
        (A, PRIMARY, [replica(B)], AlreadyPrimary),
        (C, PRIMARY, [replica(B)], NotAReplica),
        (B, PRIMARY, [replica(B, "s_down")], ReplicaDown),
        (B, PRIMARY, [replica(B, "disconnected")], ReplicaDown),
        (B, PRIMARY, [replica(B, link_ok=False)], ReplicaDown),
        (B, named(A, 1, "o_down").primary, [replica(B)], PrimaryDown),
        (B, named(A, 1, "failover_in_progress").primary, [replica(B)], PrimaryDown),
    ],
)
def test_anything_else_is_refused_by_name(
    target: Address, primary: ServerSeen, replicas: list[ServerSeen], error: type[FailoverError]
) -> None:
    with pytest.raises(error):
        check_target(target, "b", primary, replicas)


def following(**changes: Any) -> dict[str, object]:
    good = {"role": "slave", "master_host": "127.0.1.1", "master_port": 6379, "master_link_status": "up"}
    return {**good, "master_sync_in_progress": 0, **changes}


def test_a_replica_that_has_its_primarys_data_is_let_in() -> None:
    assert not_following(following(), A) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"role": "master"},
        {"role": None},
        {"master_host": "127.0.2.1"},
        {"master_port": 6380},
        {"master_link_status": "down"},
        {"master_sync_in_progress": 1},
    ],
)
def test_any_other_server_stays_behind_its_closed_address(changes: dict[str, object]) -> None:
    assert not_following(following(**changes), A) is not None
    assert not_following({}, A) is not None
