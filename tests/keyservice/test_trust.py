"""The trust log's scripts against a real server: every refusal, races, and positions without holes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from keyservice import store
from keyservice.core.keepers import Bump
from keyservice.core.revocation import Stored
from keyservice.core.rotation import KeyRecord, prepare
from keyservice.errors import OutcomeUnknown, PrimaryUnreachable, Refused, WaitingForBootstrap
from keyservice.limits import APPEND_ENTRIES_MAX
from keyservice.store import SCRIPTS, Node, load_script
from keyservice.trust import TrustLog, read_keys
from tests.keyservice.support import Server, until
from verifier.log import (
    BEAT_KEY,
    EPOCH_KEY,
    KEYS_KEY,
    LOG_KEY,
    META_KEY,
    Beat,
    Entry,
    Epoch,
    Generation,
    Meta,
    Position,
    region_key,
)
from verifier.reader import Reader
from verifier.testing import make_key

KEY = make_key()


def entry(name: str = "x") -> Entry:
    return Entry(name, "jti", "https://id.test", name, None, 2_000_000_000, "", 0, "eu")


def record(state: str = "prepared", rev: int = 0) -> KeyRecord:
    made = prepare(KEY.kid, "eu", "RS256", dict(KEY.jwk), 1.0)
    return msgspec.structs.replace(made, state=state, rev=rev)


@pytest.fixture
async def node(server: Server) -> AsyncIterator[Node]:
    made = Node(server.url)
    yield made
    await made.close()


def log_on(node: Node) -> TrustLog:
    return TrustLog(node, region="eu", max_token_lifetime_s=86_400)


BEGIN = Bump(0, None, {"eu": "keeper"})


@pytest.fixture
async def trust(node: Node) -> TrustLog:
    """A log that has begun."""
    made = log_on(node)
    assert await made.bump(BEGIN)
    return made


def place(stored: Stored) -> Position:
    assert stored.position is not None
    return stored.position


def epoch_of(server: Server) -> Epoch:
    with server.client() as client:
        return Epoch.decode(client.hgetall(EPOCH_KEY))


def read_log(server: Server) -> list[tuple[Position, Entry]]:
    """The whole log, as a verifier reads it: raises if there is a hole or a fork."""
    with server.client() as client:
        reader = Reader(Meta.decode(client.hgetall(META_KEY)), epoch_of(server))
        return reader.accept(client.xrange(LOG_KEY))


# -- epochs -----------------------------------------------------------------------------------------------------------


async def test_the_first_epoch_makes_the_log(node: Node, server: Server) -> None:
    before_ms, trust = int(time.time() * 1000), log_on(node)
    assert await trust.bump(BEGIN)
    epoch = await trust.ensure_epoch()
    assert epoch == epoch_of(server)
    assert epoch.number >= before_ms
    assert (epoch.open, epoch.generation) == (False, Generation(epoch.number, 0))
    (link,) = epoch.chain
    assert (link.number, link.nonce, link.previous, link.voters, link.opened) == (
        epoch.number,
        epoch.nonce,
        None,
        {"eu": "keeper"},
        False,
    )
    ((position, first),) = read_log(server)
    assert (position, first.kind, first.epoch_start()) == (
        Position(epoch.number, 0, epoch.nonce),
        "epoch",
        (epoch.nonce, None),
    )
    with server.client() as client:
        meta = Meta.decode(client.hgetall(META_KEY))
    assert (meta.trimmed_to, meta.writer_format, meta.max_token_lifetime_s) == (None, 1, 86_400)


async def test_writers_wait_for_the_keepers_to_begin_a_log(node: Node, server: Server) -> None:
    writer = log_on(node)
    for write in (
        lambda: writer.append([entry()]),
        lambda: writer.beat(200),
        lambda: writer.put_keys([(-1, record())]),
    ):
        with pytest.raises(WaitingForBootstrap):
            await write()
    with server.client() as client:
        assert client.dbsize() == 0
    assert await log_on(node).bump(BEGIN)
    await writer.append([entry()])


async def test_of_many_that_begin_a_log_at_once_one_does(node: Node, server: Server) -> None:
    logs = [log_on(node) for _ in range(10)]
    assert sum(await asyncio.gather(*(log.bump(BEGIN) for log in logs))) == 1
    assert len({(await log.ensure_epoch()).nonce for log in logs}) == 1
    assert sum(log.bumps for log in logs) == 1
    with server.client() as client:
        client.hset(EPOCH_KEY, "replid", "0" * 40)
    await asyncio.gather(*(log.append([entry(f"e{n}")]) for n, log in enumerate(logs)))
    assert sum(log.bumps for log in logs) == 2
    read = read_log(server)
    assert [e.kind for _, e in read] == ["epoch", "epoch", *["jti"] * 10]
    assert [link.voters for link in epoch_of(server).chain] == [{"eu": "keeper"}] * 2, "a writer keeps the voters"


async def test_what_is_left_of_a_log_is_no_first_start(trust: TrustLog, node: Node, server: Server) -> None:
    assert not await log_on(node).bump(BEGIN)
    (stored,) = await trust.append([entry()])
    with server.client() as client:
        client.delete(META_KEY)
        client.hset(EPOCH_KEY, "replid", "0" * 40)
        other = log_on(node)
        with pytest.raises(WaitingForBootstrap):
            await other.append([entry()])
        assert await other.bump(Bump(place(stored).epoch + 10**12, None, {"eu": "other"}))
    assert epoch_of(server).number == place(stored).epoch + 10**12 + 1
    assert [e.kind for _, e in read_log(server)] == ["epoch", "jti", "epoch"], "what the server still holds stays"


async def test_a_new_replication_id_makes_a_new_epoch_in_one_history(
    trust: TrustLog, server: Server, start_server: Callable[..., Server]
) -> None:
    (first,) = await trust.append([entry("a")])
    replica = start_server("replica", "--port", "0", "--replicaof", "127.0.0.1", "1")
    with server.client() as client, replica.client() as other:
        client.config_set("bind", "127.0.0.1")
        client.config_set("port", port := _free_port())
        other.replicaof("127.0.0.1", port)
        until(lambda: other.info("replication")["master_link_status"] == "up")
        assert client.info("replication")["master_replid"] != epoch_of(server).replid
        (second,) = await trust.append([entry("b")])
        assert place(second).epoch > place(first).epoch
        assert [e.id for _, e in read_log(server) if e.kind == "jti"] == ["a", "b"]
        assert epoch_of(server).chain[-1].previous == str(place(first))
        until(lambda: len(other.xrange(LOG_KEY)) == 4)
    stranger = Node(replica.url)
    try:
        with pytest.raises(PrimaryUnreachable) as refused:
            await log_on(stranger).append([entry("c")])
        assert refused.value.code == "not_primary"
    finally:
        await stranger.close()


def _free_port() -> int:
    import socket

    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@pytest.mark.parametrize("field", ["number", "nonce"])
async def test_an_epoch_that_somebody_else_opened_is_read_and_used(trust: TrustLog, server: Server, field: str) -> None:
    epoch = await trust.ensure_epoch()
    with server.client() as client:
        client.hset(EPOCH_KEY, field, {"number": str(epoch.number + 7), "nonce": "f" * 16}[field])
    (stored,) = await trust.append([entry()])
    assert place(stored).epoch == epoch_of(server).number
    assert trust.bumps == 1


async def test_a_number_is_above_everything_in_the_log(trust: TrustLog, server: Server) -> None:
    await trust.ensure_epoch()
    far = int(time.time() * 1000) + 10**9
    with server.client() as client:
        client.hset(EPOCH_KEY, mapping={"number": str(far), "replid": "0" * 40})
    trust.seen = None
    (stored,) = await trust.append([entry()])
    assert place(stored).epoch == far + 1


# -- appending --------------------------------------------------------------------------------------------------------


async def test_positions_are_dense_and_entries_come_back_as_written(trust: TrustLog, server: Server) -> None:
    stored: list[Stored] = []
    for size in (1, APPEND_ENTRIES_MAX, 3):
        stored += await trust.append([entry(f"{len(stored) + n}") for n in range(size)])
    read = read_log(server)[1:]
    assert [(at, e) for e, at in stored] == read
    assert [at.seq for at, _ in read] == list(range(1, APPEND_ENTRIES_MAX + 5))
    assert abs(stored[0].entry.at / 1000 - time.time()) < 5


@pytest.mark.parametrize("size", [0, APPEND_ENTRIES_MAX + 1])
async def test_one_call_takes_a_bounded_number(trust: TrustLog, size: int) -> None:
    with pytest.raises(ValueError, match="1 to 1,000"):
        await trust.append([entry()] * size)


async def test_values_are_exact_bytes(trust: TrustLog, server: Server) -> None:
    strange = Entry("i", "sub", "ß", " ünïcode\n\0'\"\\", 7, 2_000_000_000, "…", 0, "eu")
    await trust.append([strange])
    (_, read) = read_log(server)[-1]
    assert read.caller_fields() == strange.caller_fields()


# -- outcomes ---------------------------------------------------------------------------------------------------------


async def test_a_dead_primary_is_unreachable_and_nothing_was_sent(trust: TrustLog, server: Server) -> None:
    await trust.append([entry()])
    server.kill()
    for _ in range(3):
        await asyncio.sleep(0)  # the event loop sees that the idle connection has ended
    with pytest.raises(PrimaryUnreachable):
        await trust.append([entry()])


async def test_a_primary_that_stops_answering_leaves_the_outcome_open(trust: TrustLog, server: Server) -> None:
    await trust.append([entry("a")])
    started = time.monotonic()
    with server.stopped(), pytest.raises(OutcomeUnknown):
        await trust.append([entry("b")])
    assert time.monotonic() - started < 60  # the server would never answer
    assert [e.id for _, e in read_log(server)[1:]] in (["a"], ["a", "b"])


async def test_a_full_server_refuses_by_name(trust: TrustLog, server: Server) -> None:
    await trust.append([entry()])
    with server.client() as client:
        client.config_set("maxmemory", 1)
        with pytest.raises(Refused) as refused:
            await trust.append([entry("b")])
        assert refused.value.code == "OOM"
        client.config_set("maxmemory", 0)
    assert len(read_log(server)) == 2


async def test_warming_up_loads_every_script(node: Node, server: Server) -> None:
    await node.warm()
    with server.client() as client:
        assert all(client.script_exists(*(load_script(name)[1] for name in SCRIPTS)))


def test_every_script_is_listed() -> None:
    folder = Path(store.__file__).parent / "scripts"
    assert {path.name for path in folder.glob("*.lua")} == {*SCRIPTS, "_checks.lua"}


# -- beats ------------------------------------------------------------------------------------------------------------


async def test_a_beat_says_how_far_the_log_goes(trust: TrustLog, server: Server) -> None:
    (stored,) = await trust.append([entry()])
    beaten = await trust.beat(200)
    assert beaten.written
    with server.client() as client:
        beat = Beat.decode(client.hgetall(BEAT_KEY))
    assert (beat.n, beat.position, beat.at_ms) == (0, stored.position, beaten.server_ms)
    assert beat.generation == Generation(place(stored).epoch, 0)
    assert beat.confirmed_n is None


async def test_a_beat_that_was_deleted_is_counted_on_from_above_what_any_region_reported(
    trust: TrustLog, server: Server
) -> None:
    await trust.append([entry()])
    epoch = epoch_of(server)
    region = next(iter(epoch.chain[-1].voters))
    with server.client() as client:
        client.hset(region_key(region), mapping={"nonce": "f" * 16, "beat_n": "99"})  # of another epoch
        assert (await trust.beat(200)).written
        assert client.hget(BEAT_KEY, "n") == b"0"
        client.hset(region_key(region), mapping={"nonce": epoch.nonce, "beat_n": "41"})
        client.delete(BEAT_KEY)
        assert (await trust.beat(200)).written
        assert client.hget(BEAT_KEY, "n") == b"42"


async def test_beats_of_several_services_keep_their_distance_and_count(trust: TrustLog, server: Server) -> None:
    with server.client() as client:
        assert (await trust.beat(60_000)).written
        assert not (await trust.beat(60_000)).written
        now_ms = int(time.time() * 1000)
        for age_ms, written in ((44_000, False), (46_000, True)):
            client.hset(BEAT_KEY, "at", now_ms - age_ms)
            assert (await trust.beat(60_000)).written is written
        assert client.hget(BEAT_KEY, "n") == b"1"
        client.hset(EPOCH_KEY, "replid", "0" * 40)
        assert (await trust.beat(60_000)).written
        beat = Beat.decode(client.hgetall(BEAT_KEY))
    assert (beat.n, beat.nonce) == (0, epoch_of(server).nonce)


# -- key records ------------------------------------------------------------------------------------------------------


async def test_key_records_and_their_generation_are_read_together(trust: TrustLog, node: Node) -> None:
    generation = await trust.put_keys([(-1, record())])
    view = await read_keys(node, "eu")
    assert view.records == {KEY.kid: record()}
    assert view.generation == generation == Generation(generation.epoch, 1)


async def test_of_racing_writers_one_wins(trust: TrustLog, node: Node) -> None:
    await trust.put_keys([(-1, record())])
    logs = [log_on(node) for _ in range(5)]
    results = await asyncio.gather(
        *(log.put_keys([(0, record("published", 1))]) for log in logs), return_exceptions=True
    )
    refused = [error for error in results if isinstance(error, Refused)]
    assert [error.code for error in refused] == ["TRUST_REV"] * 4
    assert (await read_keys(node, "eu")).generation.n == 2


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ((-1, record("published", 9)), "TRUST_REV"),
        ((4, record("retiring", 9)), "TRUST_REV"),
        ((5, record("retiring", 5)), "TRUST_REV"),
        ((5, record("published", 6)), "TRUST_STATE"),
        ((5, record("nonsense", 6)), "TRUST_STATE"),
    ],
)
async def test_a_record_only_moves_forward(trust: TrustLog, node: Node, change: Any, code: str) -> None:
    await trust.put_keys([(-1, record("active", 5))])
    with pytest.raises(Refused) as refused:
        await trust.put_keys([change])
    assert refused.value.code == code
    view = await read_keys(node, "eu")
    assert (view.records[KEY.kid], view.generation.n) == (record("active", 5), 1)


async def test_what_held_a_writer_up_does_not_shorten_the_waits_that_it_starts(trust: TrustLog, node: Node) -> None:
    decided_at = int(time.time()) - 3600
    late = msgspec.structs.replace(record("published"), published_at=decided_at)
    await trust.put_keys([(-1, late)])
    published = (await read_keys(node, "eu")).records[KEY.kid]
    assert published.published_at is not None
    assert published.published_at * 1000 >= await trust.server_ms() - 60_000
    assert msgspec.structs.replace(published, published_at=decided_at) == late
    late = msgspec.structs.replace(published, state="retiring", rev=1, retiring_at=decided_at)
    await trust.put_keys([(0, late)])
    retiring = (await read_keys(node, "eu")).records[KEY.kid]
    assert retiring.retiring_at is not None
    assert retiring.retiring_at >= published.published_at
    assert msgspec.structs.replace(retiring, retiring_at=decided_at) == late


async def test_records_are_written_all_or_none(trust: TrustLog, server: Server) -> None:
    other = make_key()
    second = prepare(other.kid, "eu", "RS256", dict(other.jwk), 1.0)
    await trust.put_keys([(-1, second)])
    with pytest.raises(Refused):
        await trust.put_keys([(-1, record()), (-1, second)])
    with server.client() as client:
        assert client.hlen(KEYS_KEY) == 1


async def test_a_new_key_can_demand_that_nothing_changed(trust: TrustLog) -> None:
    epoch = await trust.ensure_epoch()
    generation = Generation(epoch.number, 0)
    await trust.put_keys([(-1, record())], unchanged_since=generation)
    other = make_key()
    with pytest.raises(Refused) as refused:
        await trust.put_keys(
            [(-1, prepare(other.kid, "eu", "RS256", dict(other.jwk), 1.0))], unchanged_since=generation
        )
    assert refused.value.code == "TRUST_REV"


async def test_a_record_under_a_false_kid_is_left_out(trust: TrustLog, node: Node, server: Server) -> None:
    await trust.put_keys([(-1, record())])
    other = make_key()
    with server.client() as client:
        client.hset(KEYS_KEY, other.kid, msgspec.json.encode(record()))
        client.hset(KEYS_KEY, "x", b"not JSON")
    assert list((await read_keys(node, "eu")).records) == [KEY.kid]
