"""Replication as the trust log needs it: a replica refuses writes by name, has the same history, and another identity
once it is promoted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from keyservice.store import load_script
from tests.conformance.scenarios import SCENARIOS, Bench, refusal
from tests.conformance.target import OwnServer, Target, free_port, own_server, until

PRIMARY_ONLY = [name for name, scenario in SCENARIOS.items() if scenario.needs_primary]


@pytest.fixture(scope="module")
def replica(directory: Path, own: OwnServer | None, target: Target) -> Iterator[redis.Redis]:
    """Follows the server of our own, as the replication user; yielded as its key service's user."""
    if own is None:
        target.not_checked("needs a second server: only with one that is started here (SERVER=…)")
    with own_server(directory, "replica") as server, target.admin() as admin, server.target().admin() as following:
        admin.config_set("bind", "127.0.0.1")
        admin.config_set("port", port := free_port())
        following.execute_command("REPLICAOF", "127.0.0.1", str(port))
        until(lambda: following.info("replication").get("master_link_status") == "up")
        with server.target().writer() as client:
            yield client
        following.execute_command("REPLICAOF", "NO", "ONE")


def test_a_replica_has_the_entries_and_the_identity_of_its_primary(bench: Bench, replica: redis.Redis) -> None:
    bench.start()
    bench.call("append.lua")
    until(lambda: replica.xlen(bench.key("log")) == 2)
    told, of_primary = replica.info("replication"), bench.client.info("replication")
    assert told["role"] == "slave"
    assert told["master_replid"] == of_primary["master_replid"]


@pytest.mark.parametrize("script", PRIMARY_ONLY)
def test_on_a_replica_a_script_refuses_by_name(bench: Bench, replica: redis.Redis, script: str) -> None:
    bench.start()
    until(lambda: replica.exists(bench.key("log")))
    there = bench.over(replica)
    held = there.everything(script)
    flagged = load_script(script)[0].startswith("#!")  # of those the server itself says so, before it runs them
    assert refusal(lambda: there.call(script)) == ("READONLY" if flagged else "TRUST_NOT_PRIMARY")
    assert there.everything(script) == held


def test_a_promoted_replica_has_another_identity(
    directory: Path, own: OwnServer | None, target: Target, bench: Bench
) -> None:
    if own is None:
        target.not_checked("needs a second server: only with one that is started here (SERVER=…)")
    with own_server(directory, "promoted") as server, target.admin() as admin, server.target().admin() as following:
        admin.config_set("bind", "127.0.0.1")
        admin.config_set("port", port := free_port())
        following.execute_command("REPLICAOF", "127.0.0.1", str(port))
        until(lambda: following.info("replication").get("master_link_status") == "up")
        bench.start()
        until(lambda: following.exists(bench.key("log")))
        following.execute_command("REPLICAOF", "NO", "ONE")
        with server.target().writer() as client:
            there = bench.over(client)
            assert refusal(lambda: there.call("append.lua")) == "TRUST_REPLID"
            assert [stream_id for stream_id, _ in there.log()] == [stream_id for stream_id, _ in bench.log()]


def test_the_server_says_who_it_is_and_how_far_it_is(target: Target) -> None:
    with target.client() as client:
        told = client.info("replication")
    assert told["role"] in ("master", "slave")
    assert len(told["master_replid"]) == 40
    assert told["master_repl_offset"] >= 0
    assert told["role"] == "master" or told["master_link_status"] == "up"


def test_a_replica_takes_no_writes_of_its_own(target: Target) -> None:
    with target.admin() as admin:
        assert admin.config_get("replica-read-only") == {"replica-read-only": "yes"}
