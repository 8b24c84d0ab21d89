"""Trimming a real server's log: nothing that lives is ever missing, for a reader that sleeps, tails, or starts."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import redis

from keyservice.core.trimming import TRIM_ENTRIES_MAX
from keyservice.errors import PrimaryUnreachable, Refused
from keyservice.store import Node
from keyservice.trimming import Trimmed, Trimmer
from tests.keyservice.support import Server, until
from tests.keyservice.trimming_support import GRACE_S, NONCE, Log, hash_of, jti, last_id, link, stream
from tests.verifier.support import ISSUER, NONCE_2, entry
from verifier import InvalidToken, Verifier
from verifier.log import BEAT_KEY, EPOCH_KEY, LOG_KEY, META_KEY, Beat
from verifier.replica import ReplicaMirror
from verifier.testing import SigningKey, StaticKeys, make_key, sign

DEAD_MIN = 10


@pytest.fixture
def client(server: Server) -> Iterator[redis.Redis]:
    with server.client() as client:
        yield client


@pytest.fixture
def log(client: redis.Redis) -> Log:
    return Log(client)


@pytest.fixture
async def node(server: Server) -> AsyncIterator[Node]:
    made = Node(server.url)
    yield made
    await made.close()


def trimmer(node: Node, **settings: Any) -> Trimmer:
    return Trimmer(node, **{"drop_grace_s": GRACE_S, "dead_min": DEAD_MIN, **settings})


@pytest.fixture
def trim(node: Node) -> Callable[[], Any]:
    made = trimmer(node)
    return made.once


@contextmanager
def mirroring(server: Server) -> Iterator[ReplicaMirror]:
    mirror = ReplicaMirror(server.url, tail_block_ms=20)
    mirror.start()
    try:
        assert mirror.wait_synced(60)
        yield mirror
    finally:
        mirror.close()


def holds(mirror: ReplicaMirror, value: str) -> bool:
    return mirror.view.snapshot.find(issuer=ISSUER, jti=value) is not None


def fresh(mirror: ReplicaMirror) -> bool:
    now, mono = time.time(), time.monotonic()
    return mirror.view.freshness.staleness(now=now, mono=mono, max_staleness_s=600).fresh


# -- what goes and what stays -----------------------------------------------------------------------------------------


async def test_the_dead_go_and_what_lives_at_the_head_is_carried_forward_as_it_is(
    trim: Any, log: Log, client: redis.Redis
) -> None:
    log.append(entry("kid", "k"))
    log.living(["long"])
    _, kid, long = stream(client)
    log.dead(20)
    log.living(["new"])
    assert await trim() == Trimmed("trimmed", removed=23, carried=2)
    log.catch_up()
    assert log.meta.trimmed_to == (1, 22)
    assert log.read()[0][0][:2] == (1, 23)
    assert stream(client)[-2:] == [(b"1-24", kid[1]), (b"1-25", long[1])]
    assert log.seq == 25


async def test_a_long_log_is_cut_in_pieces_down_to_what_lives(trim: Any, log: Log) -> None:
    for n in range(5):
        log.dead(TRIM_ENTRIES_MAX, f"d{n}")
        log.living([f"l{n}-{i}" for i in range(100)])
    done = await trim()
    while done.outcome == "trimmed":
        done = await trim()
    assert done.outcome == "quiet"
    living = {f"l{n}-{i}" for n in range(5) for i in range(100)}
    values = log.values()
    assert living <= set(values)
    assert len(values) <= 2 * len(living) + DEAD_MIN


async def test_a_log_of_the_living_is_left_alone(trim: Any, log: Log, client: redis.Redis) -> None:
    log.living([f"l{n}" for n in range(3 * TRIM_ENTRIES_MAX)])
    before = stream(client)
    assert await trim() == Trimmed("trimmed", removed=1)  # the epoch's entry
    for _ in range(3):
        assert (await trim()).outcome == "quiet"
    assert stream(client) == before[1:]


async def test_a_dead_tail_behind_a_living_head_is_reached(trim: Any, log: Log, client: redis.Redis) -> None:
    log.living([f"l{n}" for n in range(2 * TRIM_ENTRIES_MAX)])
    log.dead(3 * TRIM_ENTRIES_MAX)
    log.living(["end"])
    outcomes = [await trim() for _ in range(4)]
    assert outcomes[-1].outcome == "quiet"
    assert client.xlen(LOG_KEY) <= 2 * (2 * TRIM_ENTRIES_MAX + 1) + DEAD_MIN
    assert set(log.values()) >= {f"l{n}" for n in range(2 * TRIM_ENTRIES_MAX)} | {"end"}
    assert sum(done.carried for done in outcomes) <= sum(done.removed for done in outcomes)


async def test_an_entry_within_its_grace_by_either_clock_lives(node: Node, log: Log) -> None:
    end = int(time.time()) - GRACE_S - 60
    log.dead(20)
    behind = trimmer(node, clock=lambda: end + GRACE_S - 5.0)
    done = await behind.once()
    assert done.carried == done.removed - 1  # all but the epoch's entry
    log.catch_up()
    assert {f"dead-{n}" for n in range(20)} <= set(log.values())


async def test_unreadable_entries_are_carried_forward_with_all_their_fields(
    trim: Any, log: Log, client: redis.Redis
) -> None:
    poison = {b"v": b"2", b"kind": b"tenant", b"value": b"\xff\x00", b"later": b"x"}
    log.append_raw(poison)
    log.dead(20)
    log.living(["end"])
    await trim()
    assert stream(client)[-1][1] == poison


async def test_the_log_goes_on_densely_and_an_epoch_after_a_trim_follows(trim: Any, log: Log, server: Server) -> None:
    log.dead(20)
    log.living(["a"])
    await trim()
    log.catch_up()
    log.open_epoch(2, NONCE_2)
    log.dead(20, "later")
    log.living(["b"])
    assert [position[:2] for position, _ in log.read()][-1] == (2, 21)
    assert (await trim()).removed > 0
    assert {"a", "b"} <= set(log.values())
    log.catch_up()
    with mirroring(server) as mirror:
        assert (holds(mirror, "a"), holds(mirror, "b")) == (True, True)
        assert mirror.counters["rereads"] == 0


async def test_a_full_server_can_be_trimmed(trim: Any, log: Log, client: redis.Redis) -> None:
    log.living(["long"])
    log.dead(20)
    log.living(["end"])
    client.config_set("maxmemory", 1)
    try:
        with pytest.raises(redis.OutOfMemoryError):
            log.living(["refused"])
        log.seq -= 1
        assert (await trim()).removed > 0
    finally:
        client.config_set("maxmemory", 0)
    assert {"long", "end"} <= set(log.values())


# -- who may, and when ------------------------------------------------------------------------------------------------


async def test_without_a_log_and_in_a_closed_epoch_nothing_is_done(node: Node, client: redis.Redis) -> None:
    made = trimmer(node)
    assert await made.once() == Trimmed("no_log")
    log = Log(client)
    log.dead(20)
    client.hset(EPOCH_KEY, "open", "0")
    assert await made.once() == Trimmed("closed")
    assert client.xlen(LOG_KEY) == 21


async def test_of_many_trimmers_at_once_each_cut_is_made_by_one(node: Node, log: Log, client: redis.Redis) -> None:
    log.living(["long"])
    log.dead(3 * TRIM_ENTRIES_MAX)
    log.living(["end"])
    done = await asyncio.gather(*(trimmer(node, dead_min=1_000).once() for _ in range(8)))
    assert "lost" in {one.outcome for one in done}
    assert {"long", "end"} <= set(log.values())
    added = last_id(client)[1] - (3 * TRIM_ENTRIES_MAX + 2)
    assert added == sum(one.carried for one in done)
    assert client.xlen(LOG_KEY) == 3 * TRIM_ENTRIES_MAX + 3 + added - sum(one.removed for one in done)


async def test_a_hole_is_not_cut_over_until_it_was_answered(node: Node, log: Log, client: redis.Redis) -> None:
    log.dead(20)
    log.remove(10)
    log.living(["end"])
    assert await trimmer(node).once() == Trimmed("gap", removed=9)
    assert log.meta.trimmed_to == (1, 8)
    assert (await trimmer(node).once()).removed == 0
    done = await trimmer(node, answered=lambda: [((1, 9), (1, 11))]).once()
    assert done == Trimmed("trimmed", removed=11)
    assert log.values() == ["end"]


async def test_a_hole_that_the_next_epoch_answered_is_cut_off(node: Node, log: Log, server: Server) -> None:
    log.dead(20)
    log.remove(10)
    log.living(["end"])
    with mirroring(server) as mirror:
        await asyncio.to_thread(until, lambda: mirror.view.freshness.holed_nonce == NONCE)
        assert mirror.answered_gaps == frozenset()
        log.open_epoch(2, NONCE_2)
        log.living(["added-again"])
        log.beat()
        await asyncio.to_thread(until, lambda: fresh(mirror))
        done = await trimmer(node, answered=lambda: mirror.answered_gaps).once()
    assert (done.outcome, done.removed) == ("trimmed", 23 - 1)  # all but what was added again; its seam went too
    assert log.values() == ["added-again", "end"]


def script_args(log: Log, **changes: Any) -> list[Any]:
    given: dict[str, Any] = {
        "number": "1", "nonce": NONCE, "trimmed_to": "", "following": "1-3", "first": "1-0", "last": "1-3",
        "survivor": "1-4", "count": 4, "now": int(time.time()), "grace": GRACE_S, "carried": [2],
    }  # fmt: skip
    given.update(changes)
    return [*list(given.values())[:-1], *given["carried"]]


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"number": "2"}, "TRUST_EPOCH"),
        ({"nonce": NONCE_2}, "TRUST_EPOCH"),
        ({"trimmed_to": "1-0"}, "TRUST_TRIMMED"),
        ({"first": "1-1"}, "TRUST_TRIMMED"),
        ({"last": "1-2"}, "TRUST_TRIMMED"),
        ({"survivor": "1-5"}, "TRUST_TRIMMED"),
        ({"count": 3}, "TRUST_TRIMMED"),
        ({"count": 99}, "TRUST_TRIMMED"),
        ({"following": "1-2"}, "TRUST_TRIM_PLACE"),
        ({"following": "1-4"}, "TRUST_TRIM_PLACE"),
        ({"following": "0-9"}, "TRUST_TRIM_PLACE"),
        ({"carried": []}, "TRUST_TRIM_LIVE"),
        ({"carried": [3]}, "TRUST_TRIM_LIVE"),
        ({"grace": 10**6}, "TRUST_TRIM_LIVE"),
        ({"now": 1}, "TRUST_TRIM_LIVE"),
    ],
)
async def test_the_script_itself_lets_nothing_go_that_lives(
    node: Node, log: Log, client: redis.Redis, changes: dict[str, Any], code: str
) -> None:
    log.living(["long"])
    log.dead(3)
    keys = (LOG_KEY, EPOCH_KEY, META_KEY)
    before = [client.dump(key) for key in keys]
    with pytest.raises(Refused) as refused:
        await node.run("trim.lua", keys, script_args(log, **changes))
    assert refused.value.code == code
    assert [client.dump(key) for key in keys] == before
    await node.run("trim.lua", keys, script_args(log))
    assert log.values() == ["dead-2", "long"]


async def test_a_clock_that_is_ahead_at_the_caller_lets_nothing_go_early(
    node: Node, log: Log, client: redis.Redis
) -> None:
    log.append(jti("ends-now", int(time.time()) - GRACE_S + 3_600))
    log.dead(3)
    args = script_args(log, now=int(time.time()) + 10**8, carried=[])
    with pytest.raises(Refused) as refused:
        await node.run("trim.lua", (LOG_KEY, EPOCH_KEY, META_KEY), args)
    assert refused.value.code == "TRUST_TRIM_LIVE"


async def test_a_replica_and_a_dead_server_are_named(
    node: Node, log: Log, server: Server, start_server: Callable[..., Server]
) -> None:
    log.dead(20)
    log.client.replicaof("127.0.0.1", 1)
    with pytest.raises(PrimaryUnreachable) as refused:
        await trimmer(node).once()
    assert refused.value.code == "not_primary"
    server.kill()
    with pytest.raises(PrimaryUnreachable):
        await trimmer(node).once()


# -- the chain --------------------------------------------------------------------------------------------------------


async def test_the_chain_forgets_epochs_that_the_log_no_longer_holds(trim: Any, log: Log, client: redis.Redis) -> None:
    for number in range(2, 8):
        log.open_epoch(number, f"{number:016x}")
        log.dead(5, f"d{number}")
    log.living(["end"])
    client.hset(EPOCH_KEY, "known", "[]")
    before = log.epoch
    assert (await trim()).links == 5
    epoch = log.epoch
    assert [one.number for one in epoch.chain] == [6, 7]
    assert epoch.chain == before.chain[-2:]
    assert (epoch.number, epoch.nonce, epoch.open, epoch.known) == (before.number, before.nonce, True, ())
    assert "end" in log.values()


@pytest.mark.parametrize(
    ("chain", "code"),
    [("[]", "TRUST_STATE"), ('[{"number":1,"nonce":"fedcba9876543210"}]', "TRUST_STATE")],
)
async def test_the_chain_always_ends_with_the_current_epoch(node: Node, log: Log, chain: str, code: str) -> None:
    text = hash_of(log.client, EPOCH_KEY)[b"chain"].decode()
    with pytest.raises(Refused) as refused:
        await node.run("prune.lua", (EPOCH_KEY,), ["1", NONCE, text, chain, "[]", "[]"])
    assert refused.value.code == code
    with pytest.raises(Refused) as refused:
        await node.run("prune.lua", (EPOCH_KEY,), ["1", NONCE, "[]", text, "[]", "[]"])
    assert refused.value.code == "TRUST_REV"


# -- readers ----------------------------------------------------------------------------------------------------------


async def test_a_tailing_mirror_sees_nothing_of_a_trim(trim: Any, log: Log, server: Server) -> None:
    log.living(["long"])
    log.dead(30)
    log.beat()
    with mirroring(server) as mirror:
        until(lambda: fresh(mirror))
        assert (await trim()).removed > 0
        log.catch_up()
        log.living(["after"])
        log.beat()
        until(lambda: str(mirror.view.position) == log.position)
        until(lambda: fresh(mirror))
        assert (holds(mirror, "long"), holds(mirror, "after"), mirror.counters["rereads"]) == (True, True, 0)


async def test_a_log_trimmed_past_a_sleeping_mirror_is_read_again_and_nothing_is_unrevoked(
    trim: Any, log: Log, server: Server
) -> None:
    log.living(["seen"])
    with mirroring(server) as mirror:
        until(lambda: holds(mirror, "seen"))
        mirror.close()  # sleeps
        log.append(jti("never-seen-and-dead", int(time.time()) - GRACE_S - 60))
        log.living(["missed"])
        log.dead(60)
        log.living(["end"])
        while (await trim()).outcome == "trimmed":
            pass
        log.catch_up()
        assert log.meta.trimmed_to is not None
        assert log.meta.trimmed_to > (1, 3)
        log.beat()
        mirror.start()
        until(lambda: holds(mirror, "missed") and fresh(mirror))
        assert holds(mirror, "seen")
        assert mirror.counters["reread_trimmed"] == 1
        assert (mirror.counters["reread_hole"], mirror.view.freshness.holed_nonce) == (0, None)


async def test_a_mirror_that_sleeps_through_epochs_and_trims_wakes_up_complete(
    trim: Any, log: Log, server: Server
) -> None:
    log.living(["seen"])
    with mirroring(server) as mirror:
        until(lambda: holds(mirror, "seen"))
        mirror.close()
        for number in range(2, 6):
            log.open_epoch(number, f"{number:016x}")
            log.living([f"missed-{number}"])
            log.dead(40, f"d{number}")
            while (await trim()).outcome == "trimmed":
                pass
            log.catch_up()
        assert len(log.epoch.chain) < 5  # its own epoch is not even named any more
        log.beat()
        mirror.start()
        until(lambda: all(holds(mirror, f"missed-{number}") for number in range(2, 6)) and fresh(mirror))
        assert holds(mirror, "seen")


async def test_a_trim_between_the_batches_of_a_first_read_is_no_hole(
    node: Node, log: Log, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("verifier.replica.READ_BATCH_ENTRIES", 5)
    log.living(["long"])
    log.dead(100)
    log.beat()
    mirror = ReplicaMirror(server.url, tail_block_ms=20)
    loop, trims = asyncio.get_running_loop(), trimmer(node)
    trimmed: list[Trimmed] = []

    def on_change(view: Any) -> None:
        if not trimmed and mirror.counters["entries_read"] >= 10:  # between two of its batches, in its own thread
            trimmed.append(asyncio.run_coroutine_threadsafe(trims.once(), loop).result(10))
            assert (view.position, view.freshness.confirmed) == (None, None)

    mirror.subscribe(on_change)
    mirror.start()
    try:
        assert await asyncio.to_thread(mirror.wait_synced, 10)
        await asyncio.to_thread(until, lambda: fresh(mirror))
        assert trimmed[0].removed > 10
        assert holds(mirror, "long")
        assert (mirror.counters["reread_trimmed"], mirror.counters["rereads"]) == (1, 1)
        assert mirror.counters["failures"] == 0
    finally:
        await asyncio.to_thread(mirror.close)


async def test_no_beat_counts_before_what_was_carried_forward_is_read(
    trim: Any, log: Log, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A beat from before the trim vouches for a place that a half-read log has, without what stood before it."""
    log.living(["seen"])
    with mirroring(server) as mirror:
        until(lambda: holds(mirror, "seen"))
        mirror.close()
        log.living(["missed"])
        log.dead(40)
        log.living([f"middle-{n}" for n in range(20)])
        log.beat()
        state = mirror.view.freshness.heard(
            _beat(log), log.epoch, log.meta, now=time.time(), mono=time.monotonic()
        )  # heard while it was asleep in the middle of the log: it waits for its position
        mirror._publish(freshness=state)
        log.living([f"end-{n}" for n in range(20)])
        assert (await trim()).carried == 2
        log.catch_up()
        assert log.values()[0] == "middle-0"
        assert log.values()[-1] == "missed"
        fooled: list[bool] = []
        mirror.subscribe(lambda view: fooled.append(fresh(mirror) and not holds(mirror, "missed")))
        monkeypatch.setattr("verifier.replica.READ_BATCH_ENTRIES", 5)
        mirror.start()
        until(lambda: holds(mirror, "missed"))
        until(lambda: fresh(mirror))
        assert len(fooled) > 5
        assert not any(fooled)


def _beat(log: Log) -> Any:
    return Beat.decode(hash_of(log.client, BEAT_KEY))


async def test_a_verifier_that_starts_after_a_trim_refuses_what_lives(trim: Any, log: Log, server: Server) -> None:
    key = make_key()
    log.living(["revoked"])
    log.dead(30)
    log.living(["end"])
    assert (await trim()).carried == 1
    log.catch_up()
    log.beat()
    verifier = Verifier(
        issuer=ISSUER,
        audience="orders",
        jwks_urls=None,
        jwks=StaticKeys(key).jwks,
        redis_url=server.url,
        max_staleness_s=600,
    )
    with verifier:
        assert verifier.wait_ready(60)
        assert _code(verifier, key, "revoked") == "token_revoked"
        assert _code(verifier, key, "good") is None
        assert verifier.status().fresh


def _code(verifier: Verifier, key: SigningKey, jti_: str) -> str | None:
    now = int(time.time())
    token = sign(key, {"iss": ISSUER, "aud": "orders", "sub": "ada", "jti": jti_, "iat": now, "exp": now + 900})
    try:
        verifier.verify(token)
    except InvalidToken as error:
        return error.code
    return None


def test_links_of_the_tests_have_nonces_of_the_right_form() -> None:
    assert link(3).nonce == "0000000000000003"
