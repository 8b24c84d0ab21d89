"""What each user may do, by trying every command that the server has.

A command is first queued (MULTI … DISCARD), which asks the same access check and executes nothing; only what the server
has refused so is also sent for real. Commands that cannot be queued are sent at once: none of them does harm as it is
sent here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import redis

from tests.conformance.scenarios import Bench, refusal
from tests.conformance.target import Target
from verifier.log import LOG_KEY

ALWAYS = {"auth", "hello", "quit", "reset"}
"""The server lets anybody: they concern the connection alone."""

VERIFIER = {
    *("xread", "xrange", "xrevrange", "xlen", "xinfo|stream", "hget", "hmget", "hgetall", "hlen", "hexists", "get"),
    *("exists", "type", "multi", "exec", "discard", "info", "time", "ping", "client|id", "client|getname"),
    *("client|setname", "client|setinfo"),
}
SWITCHED_OFF = "command not allowed. if the enable-"
"""DEBUG and MODULE, unless the server's configuration lets somebody: asked before the access rules."""

REPLICATION = {"psync", "replconf", "ping"}
SCRIPTING = {"eval", "evalsha", "eval_ro", "evalsha_ro", "script|load", "script|exists"}

OUTSIDE = ("{ks}:private:eu", "session:1", "{trust}", "{trust}x:log", "trust:log", "{TRUST}:log", "{trust:}log")


@dataclass(frozen=True)
class Command:
    name: str
    arity: int
    flags: frozenset[str]
    categories: frozenset[str]
    first_key: int

    @property
    def words(self) -> list[str]:
        """With as many arguments as it needs, all of them a key that a verifier may read."""
        name = self.name.split("|")
        if self.name == "shutdown":
            return ["shutdown", "abort"]
        return name + [LOG_KEY] * max(0, abs(self.arity) - len(name))


def _flat(reply: list[Any]) -> Iterator[Command]:
    texts = [{str(_text(word)).lower().lstrip("@") for word in reply[place]} for place in (2, 6)]
    yield Command(_text(reply[0]), reply[1], frozenset(texts[0]), frozenset(texts[1]), reply[3])
    for sub in reply[9]:
        yield from _flat(sub)


def _text(word: Any) -> str:
    return word.decode() if isinstance(word, bytes) else str(word)


@pytest.fixture(scope="module")
def commands(target: Target) -> list[Command]:
    """Every command and subcommand of this server."""
    with target.client() as client:
        connection = client.connection_pool.get_connection()
        try:
            connection.send_command("COMMAND")
            reply = connection.read_response()
        finally:
            client.connection_pool.release(connection)
    found = [command for one in reply for command in _flat(one)]
    containers = {command.name.partition("|")[0] for command in found if "|" in command.name}
    return [command for command in found if command.name not in containers]


def allowed(client: redis.Redis, commands: list[Command]) -> set[str]:
    """The commands that are not refused."""
    return {command.name for command in commands if command.name not in ALWAYS and not _refused(client, command)}


def _refused(client: redis.Redis, command: Command) -> bool:
    if "no_multi" in command.flags:
        return _says_no(client, [command.words])
    if not _says_no(client, [["multi"], command.words, ["discard"]]):
        return False
    return _says_no(client, [command.words])


def _says_no(client: redis.Redis, sent: list[list[str]]) -> bool:
    connection = client.connection_pool.get_connection()
    refused = False
    try:
        for words in sent:
            connection.send_command(*words)  # type: ignore[no-untyped-call]
            try:
                connection.read_response()
            except redis.ResponseError as error:
                said = str(error).lower()
                named = "permission" in said and f"'{'|'.join(_name(words))}'" in said
                refused = refused or named or SWITCHED_OFF in said
    finally:
        connection.disconnect()  # type: ignore[no-untyped-call]
        client.connection_pool.release(connection)
    return refused


def _name(words: list[str]) -> list[str]:
    """The error names a container's subcommand as well."""
    return words[:2] if len(words) > 1 and words[1] != LOG_KEY and words[0] != "shutdown" else words[:1]


# -- the verifier -----------------------------------------------------------------------------------------------------


def test_a_verifier_may_read_and_nothing_else_of_all_that_the_server_can(
    target: Target, commands: list[Command]
) -> None:
    assert len(commands) > 200
    with target.user("verifier") as client:
        may = allowed(client, commands)
    known = {command.name for command in commands}
    assert may == VERIFIER & known
    writing = {command.name for command in commands if command.categories & {"write", "admin", "scripting", "pubsub"}}
    assert not may & writing


@pytest.mark.parametrize("key", OUTSIDE)
def test_a_verifier_reads_nothing_outside_the_trust_keys(target: Target, key: str) -> None:
    calls: list[list[str]] = [
        ["GET", key],
        ["HGETALL", key],
        ["HGET", key, "x"],
        ["EXISTS", key],
        ["EXISTS", LOG_KEY, key],
        ["TYPE", key],
        ["XLEN", key],
        ["XRANGE", key, "-", "+"],
        ["XREAD", "STREAMS", key, "0"],
        ["XREAD", "STREAMS", LOG_KEY, key, "0", "0"],
        ["XINFO", "STREAM", key],
    ]
    with target.user("verifier") as client:
        for words in calls:
            assert refusal(lambda words=words: client.execute_command(*words)) == "NOPERM", words  # type: ignore[misc]
            with client.pipeline(transaction=True) as pipe, pytest.raises(redis.ResponseError, match=r"(?i)permission"):
                pipe.execute_command(*words).execute()


def test_a_verifier_changes_nothing_in_the_trust_keys(target: Target, bench: Bench) -> None:
    bench.start()
    bench.call("append.lua")
    held, log = [bench.log(), bench.hash("epoch"), bench.hash("meta")], bench.key("log")
    epoch = bench.key("epoch")
    calls: list[list[str]] = [
        *([name, log] for name in ("DEL", "UNLINK", "PERSIST", "TOUCH", "GETDEL", "INCR", "DUMP")),
        ["SET", epoch, "x"],
        ["HSET", epoch, "open", "1"],
        ["HDEL", epoch, "nonce"],
        ["EXPIRE", epoch, "1"],
        ["GETEX", epoch, "EX", "1"],
        ["RENAME", epoch, log],
        ["COPY", epoch, log, "REPLACE"],
        ["XADD", log, "*", "v", "1"],
        ["XDEL", log, f"{bench.number}-1"],
        ["XTRIM", log, "MAXLEN", "0"],
        ["XSETID", log, "9-9"],
        ["XGROUP", "CREATE", log, "g", "0"],
        ["XREADGROUP", "GROUP", "g", "c", "STREAMS", log, ">"],
        ["EVAL", "return redis.call('DEL', KEYS[1])", "1", log],
        ["EVAL_RO", "return 1", "0"],
        ["FCALL", "f", "0"],
        ["PUBLISH", "c", "x"],
        ["SUBSCRIBE", "c"],
        ["SELECT", "0"],
        ["SORT", log],
    ]
    with target.user("verifier") as client:
        for words in calls:
            assert refusal(lambda words=words: client.execute_command(*words)) == "NOPERM", words  # type: ignore[misc]
        assert client.xlen(log) == 2
    assert [bench.log(), bench.hash("epoch"), bench.hash("meta")] == held


# -- the others -------------------------------------------------------------------------------------------------------


def test_the_key_service_administers_nothing(target: Target, commands: list[Command]) -> None:
    with target.user("keyservice") as client:
        may = allowed(client, commands)
    by_category = {
        category: {command.name for command in commands if category in command.categories}
        for category in ("admin", "dangerous", "pubsub", "scripting", "connection")
    }
    assert may & (by_category["admin"] | by_category["dangerous"] | by_category["pubsub"]) == {"info"}
    assert may & by_category["scripting"] == SCRIPTING
    assert not may & {"select", "scan", "randomkey", "dbsize", "rename", "copy", "move", "dump", "object|encoding"}
    assert VERIFIER & {command.name for command in commands} <= may


@pytest.mark.parametrize("key", [key for key in OUTSIDE if not key.startswith("{ks}:")])
def test_the_key_service_touches_nothing_but_its_keys_also_in_scripts(target: Target, bench: Bench, key: str) -> None:
    with target.user("keyservice") as client:
        for words in (["GET", key], ["SET", key, "x"], ["DEL", key], ["XADD", key, "*", "v", "1"]):
            assert refusal(lambda words=words: client.execute_command(*words)) == "NOPERM", words  # type: ignore[misc]
        assert refusal(lambda: client.eval("return 1", 1, key)) == "NOPERM"
        for body in (f"redis.call('SET', '{key}', 'x')", "redis.call('FLUSHALL')", "redis.call('CONFIG', 'GET', '*')"):
            with pytest.raises(redis.ResponseError, match=r"(?i)permission|not allowed|can't (run|access)"):
                client.eval(body, 0)
        assert client.set(bench.names.private("probe"), "1")


def test_a_replication_user_replicates_and_nothing_else(target: Target, commands: list[Command]) -> None:
    with target.user("replication") as client:
        assert allowed(client, [command for command in commands if command.name != "psync"]) == REPLICATION - {"psync"}


def test_an_observer_sees_no_key_and_changes_nothing(target: Target, commands: list[Command]) -> None:
    with target.user("observer") as client:
        may = allowed(client, commands)
    assert {"info", "role", "ping"} <= may
    for command in commands:
        if command.name in may:
            assert command.first_key == 0, command.name
            assert not command.categories & {"read", "write", "keyspace", "scripting", "pubsub"}, command.name


def test_nobody_gets_in_without_a_password(target: Target) -> None:
    if not target.own:
        target.not_checked("the user default is its operator's")
    with target.stranger() as client:
        for call in (client.ping, lambda: client.get(LOG_KEY)):
            with pytest.raises(redis.AuthenticationError):
                call()


def test_no_user_of_the_product_is_without_a_password(target: Target) -> None:
    with target.admin() as admin:
        told = admin.execute_command("ACL", "LIST")
    assert all(b"nopass" not in line for line in told if b"conformance-" in line or target.own)
