"""A kind that old verifiers would skip is not written while they call themselves fresh."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
import redis

from keyservice import formats
from keyservice.errors import PrimaryUnreachable, Refused, RequestRefused
from keyservice.formats import format_needed, raise_min_reader_format
from keyservice.store import Node, load_script
from tests.keyservice.support import Server, until
from tests.keyservice.test_trimming import fresh, holds, mirroring
from tests.keyservice.trimming_support import NONCE, Log, jti
from tests.verifier.support import entry
from verifier.log import BEAT_KEY, EPOCH_KEY, FORMAT, KIND_FORMATS, KINDS, LOG_KEY, META_KEY


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


# -- raising ----------------------------------------------------------------------------------------------------------


async def test_min_reader_format_is_raised_and_never_lowered(
    node: Node, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "FORMAT", 3)
    assert await raise_min_reader_format(node, 3) == 3
    assert (log.meta.min_reader_format, log.meta.writer_format) == (3, 3)
    assert await raise_min_reader_format(node, 2) == 3
    assert (log.meta.min_reader_format, log.meta.writer_format) == (3, 3)


@pytest.mark.parametrize("wanted", [0, -1, FORMAT + 1])
async def test_a_format_that_this_release_does_not_know_cannot_be_demanded(node: Node, log: Log, wanted: int) -> None:
    before = log.meta
    with pytest.raises(RequestRefused) as refused:
        await raise_min_reader_format(node, wanted)
    assert refused.value.code == "reader_format_unknown"
    assert log.meta == before
    assert await raise_min_reader_format(node, FORMAT) == FORMAT


async def test_without_a_log_or_a_server_nothing_is_raised(node: Node, server: Server) -> None:
    with pytest.raises(Refused) as refused:
        await raise_min_reader_format(node, FORMAT)
    assert refused.value.code == "TRUST_NO_EPOCH"
    server.kill()
    with pytest.raises(PrimaryUnreachable):
        await raise_min_reader_format(node, FORMAT)


async def test_it_is_raised_in_the_current_epoch_only(node: Node, log: Log, client: redis.Redis) -> None:
    client.hset(EPOCH_KEY, "replid", "0" * 40)
    with pytest.raises(Refused) as refused:
        await raise_min_reader_format(node, FORMAT)
    assert refused.value.code == "TRUST_REPLID"


# -- writing ----------------------------------------------------------------------------------------------------------


def test_the_kinds_of_this_release_are_of_format_1() -> None:
    assert set(KIND_FORMATS) == KINDS
    assert set(KIND_FORMATS.values()) == {1}
    assert format_needed([]) == format_needed([entry("kid", "k"), jti("a", 1)]) == 1


def test_the_script_that_appends_knows_the_same_kinds() -> None:
    (table,) = re.findall(r"local kind_formats = \{(.*?)\}", load_script("append.lua")[0])
    assert {name: int(needed) for name, needed in re.findall(r"(\w+) = (\d+)", table)} == KIND_FORMATS


def append_args(kind: str) -> list[str | int]:
    return ["1", NONCE, "", "id-1", kind, "i", "v", "", "2000000000", "", "0", "eu"]


@pytest.fixture
def later_release(monkeypatch: pytest.MonkeyPatch) -> None:
    """A release in which ``jti`` had come with format 2."""
    text = load_script("append.lua")[0]
    changed = text.replace("jti = 1", "jti = 2")
    assert changed != text
    monkeypatch.setattr("keyservice.store.load_script", lambda _: (changed, "0" * 40))


@pytest.mark.usefixtures("later_release")
async def test_a_kind_is_written_only_after_readers_must_know_it(node: Node, log: Log, client: redis.Redis) -> None:
    keys = (LOG_KEY, EPOCH_KEY, BEAT_KEY, META_KEY)
    for given in (keys, keys[:3]):
        with pytest.raises(Refused) as refused:
            await node.run("append.lua", given, append_args("jti"))
        assert refused.value.code == "TRUST_READERS"
    assert client.xlen(LOG_KEY) == 1
    await node.run("append.lua", keys, append_args("sid"))  # a kind that they know
    client.hset(META_KEY, "min_reader_format", "2")
    await node.run("append.lua", keys, append_args("jti"))
    assert client.xlen(LOG_KEY) == 3


async def test_a_kind_of_no_release_is_not_written(node: Node, log: Log, client: redis.Redis) -> None:
    with pytest.raises(Refused) as refused:
        await node.run("append.lua", (LOG_KEY, EPOCH_KEY, BEAT_KEY, META_KEY), append_args("tenant"))
    assert refused.value.code == "TRUST_KIND"
    assert client.xlen(LOG_KEY) == 1


# -- verifiers --------------------------------------------------------------------------------------------------------


async def test_a_verifier_below_min_reader_format_is_not_fresh_by_name_and_goes_on_reading(
    node: Node, log: Log, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    log.beat()
    with mirroring(server) as mirror:
        until(lambda: fresh(mirror))
        monkeypatch.setattr(formats, "FORMAT", FORMAT + 1)  # a newer release raises it
        await raise_min_reader_format(node, FORMAT + 1)
        log.beat()
        until(lambda: reason(mirror) == "log_format_newer")
        log.living(["a"])
        until(lambda: holds(mirror, "a"))


def reason(mirror: Any) -> str | None:
    now, mono = time.time(), time.monotonic()
    told: str | None = mirror.view.freshness.staleness(now=now, mono=mono, max_staleness_s=600).reason
    return told


async def test_a_newer_kind_is_skipped_loudly_counted_and_stops_nobody(
    log: Log, server: Server, caplog: pytest.LogCaptureFixture, make_newer: Callable[[], dict[bytes, bytes]]
) -> None:
    log.living(["a"])
    log.append_raw(make_newer())
    log.living(["b"])
    log.beat()
    with caplog.at_level(logging.ERROR), mirroring(server) as mirror:
        until(lambda: fresh(mirror))
        assert (holds(mirror, "a"), holds(mirror, "b")) == (True, True)
        assert (mirror.counters["entries_skipped"], mirror.counters["rereads"]) == (1, 0)
    assert "format_newer" in caplog.text


@pytest.fixture
def make_newer() -> Callable[[], dict[bytes, bytes]]:
    fields = {name.encode(): text.encode() for name, text in jti("x", 2_000_000_000).encode().items()}
    return lambda: {**fields, b"v": b"2", b"kind": b"tenant", b"scope": b"orders"}
