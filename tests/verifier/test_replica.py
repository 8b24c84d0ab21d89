"""What only a mirror over Redis has: its credentials, its list of servers, its batches."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import pytest
import redis

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
)
from tests.verifier.support import until
from tests.verifier.valkey import PASSWORD, Primary, Server, command, live
from verifier.replica import ReplicaMirror

__all__ = ["client", "module_dir", "primary", "server", "shared_server", "short_rounds"]

# -- access ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("password", ["wrong", None])
def test_a_wrong_password_is_named_and_appears_nowhere(
    server: Server, primary: Primary, password: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    with over_redis(f"unix://{server.socket}", password=password) as mirror:
        until(lambda: mirror.view.problem == "wrong_credentials", "named")
        assert not mirror.wait_synced(0)
    assert "wrong_credentials" in caplog.text
    assert "wrong_credentials" not in repr(mirror)


def test_a_password_that_is_set_right_is_named_nowhere(
    server: Server, primary: Primary, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, logger="verifier"), over_redis(server) as mirror:
        reaches(mirror, primary.position)
        with server.client() as client:
            command(client, "CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        until(lambda: mirror.counters["disconnects"] > 0, "lost")
    assert PASSWORD not in caplog.text + repr(mirror) + repr(mirror.view)


def test_a_user_that_may_not_read_the_log_is_named(server: Server, primary: Primary, client: redis.Redis) -> None:
    command(client, "ACL", "SETUSER", "verifier", "on", ">pw", "~other:*", "+@all")
    try:
        with over_redis(f"unix://{server.socket}", username="verifier", password="pw") as mirror:
            until(lambda: mirror.view.problem == "no_permission", "named")
    finally:
        command(client, "ACL", "DELUSER", "verifier")


def test_reading_needs_no_more_than_reading(server: Server, primary: Primary, client: redis.Redis) -> None:
    command(
        client, "ACL", "SETUSER", "verifier", "on", ">pw", "~{trust}:*", "-@all", "+@read", "+multi", "+exec", "+ping"
    )
    try:
        primary.append(*live("jti", ["a"]))
        with over_redis(f"unix://{server.socket}", username="verifier", password="pw") as mirror:
            reaches(mirror, primary.position)
    finally:
        command(client, "ACL", "DELUSER", "verifier")


def test_a_server_that_is_not_there_is_named(run_dir: Path) -> None:
    with over_redis(f"unix://{run_dir}/nobody") as mirror:
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


def test_a_mirror_closed_in_its_first_read_is_not_synced_when_started_again(
    server: Server, primary: Primary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("verifier.replica.READ_BATCH_ENTRIES", 10)
    primary.append(*live("jti", [f"t-{n}" for n in range(300)]))
    with over_redis(server, OnEntries(lambda _: time.sleep(0.002))) as mirror:
        until(lambda: mirror.counters["entries_read"] > 0, "reading")
        mirror.close()
        assert not mirror.view.freshness.synced
        assert mirror.view.snapshot.entries < 300
        mirror.start()
        assert mirror.wait_synced(60)
        assert holds(mirror, "t-299")


@pytest.mark.parametrize("protocol", [2, 3])
def test_a_log_that_contradicts_itself_between_batches_is_read_again_on_the_same_connection(
    server: Server, primary: Primary, monkeypatch: pytest.MonkeyPatch, protocol: int
) -> None:
    monkeypatch.setattr("verifier.replica.READ_BATCH_ENTRIES", 10)
    primary.append(*live("jti", [f"t-{n}" for n in range(100)]))
    primary.remove(25)
    with over_redis(f"{server.url}{'&' if '?' in server.url else '?'}protocol={protocol}") as mirror:
        until(lambda: mirror.view.position is not None, "read to its end")
        assert (mirror.counters["reread_hole"], mirror.counters["disconnects"]) == (1, 0)
        assert [n for n in range(100) if not holds(mirror, f"t-{n}")] == [24]


# -- passwords that change ---------------------------------------------------------------------------------------------


def test_a_rotated_password_is_named_when_the_connection_is_renewed_and_heals_without_a_restart(
    server: Server, primary: Primary, client: redis.Redis
) -> None:
    command(client, "ACL", "SETUSER", "rotating", "on", ">old", "~{trust}:*", "-@all", "+@read", "+multi", "+exec")
    try:
        with over_redis(f"unix://{server.socket}", username="rotating", password="old") as mirror:
            reaches(mirror, primary.position)
            command(client, "ACL", "SETUSER", "rotating", "<old", ">new")
            command(client, "CLIENT", "KILL", "USER", "rotating")
            until(lambda: mirror.view.problem == "wrong_credentials", "named")
            assert mirror.view.freshness.synced  # what is held stays, and ages
            command(client, "ACL", "SETUSER", "rotating", ">old")  # both, as a rotation should have it
            primary.append(*live("jti", ["a"]))
            reaches(mirror, primary.position)
            assert holds(mirror, "a")
    finally:
        command(client, "ACL", "DELUSER", "rotating")


def test_a_right_that_is_taken_away_while_it_follows_is_named(
    server: Server, primary: Primary, client: redis.Redis
) -> None:
    command(client, "ACL", "SETUSER", "reader", "on", ">pw", "~{trust}:*", "-@all", "+@read", "+multi", "+exec")
    try:
        with over_redis(f"unix://{server.socket}", username="reader", password="pw") as mirror:
            reaches(mirror, primary.position)
            command(client, "ACL", "SETUSER", "reader", "-xread")
            until(lambda: mirror.view.problem == "no_permission", "named")
            command(client, "ACL", "SETUSER", "reader", "+xread")
            reaches(mirror, primary.position)
            assert mirror.view.problem is None
    finally:
        command(client, "ACL", "DELUSER", "reader")
