"""What was deleted by hand must not make an entry look replicated, and what was appended is not kept for ever."""

from __future__ import annotations

import pytest

from keyservice.core.evidence import EpochKey, LogHead, key_of
from keyservice.core.keepers import Add, Bump, Keeper, MemoryDisk
from keyservice.errors import WaitingForBootstrap
from keyservice.store import Node
from keyservice.trust import TrustLog
from tests.keyservice.support import Server
from verifier.log import Entry, Epoch, EpochLink, Generation, Position

NONCE = "1" * 16


def entry(value: str) -> Entry:
    return Entry(value, "jti", "https://id.test", value, None, 4_102_444_800, "", 1, "eu")


async def test_nothing_is_appended_where_the_log_was_deleted(server: Server) -> None:
    """It would get a place again that keepers have reported as held, and a receipt that says replicated."""
    node = Node(server.url)
    trust = TrustLog(node, region="eu", max_token_lifetime_s=86_400)
    try:
        await trust.bump(Bump(0, None, {"eu": "k"}))
        (first,) = await trust.append([entry("first")])
        assert first.position is not None
        seen = EpochKey(first.position.epoch, first.position.nonce)
        with server.client() as client:
            client.delete("{trust}:log")
        with pytest.raises(WaitingForBootstrap):
            await trust.append([entry("second")])
        with pytest.raises(Exception, match="TRUST_NO_EPOCH"):
            await trust.add(Add(seen, (entry("second"),), ()))
        assert await trust.bump(Bump(seen.number, None, {"eu": "k"}))
        (second,) = await trust.append([entry("second")])
        assert second.position is not None
        assert second.position.epoch > first.position.epoch
    finally:
        await node.close()


def head(seq: int) -> LogHead:
    link = EpochLink(1, NONCE, None, {"eu": "k"}, True)
    epoch = Epoch(1, NONCE, "r", True, Generation(1, 0), (link,))
    return LogHead(epoch, None, Position(1, seq, NONCE))


def merged_keeper() -> Keeper:
    keeper = Keeper("eu", MemoryDisk("k"))
    keeper.begin()
    step = keeper.next_step(head(0), 0.0)
    assert isinstance(step, Add)
    keeper.added(step, -1, 0.0)
    assert keeper.merged == key_of(head(0).epoch)
    return keeper


def test_what_the_log_has_shown_before_its_writer_was_answered_is_not_remembered() -> None:
    keeper = merged_keeper()
    for seq in range(1, 101):
        one = entry(f"t-{seq}")
        keeper.intend([one], 5.0)
        keeper.read([(Position(1, seq, NONCE), one)])
        keeper.appended(EpochKey(1, NONCE), [one])
    assert keeper._added == {}


def test_what_is_on_its_way_to_the_replica_is_not_added_again() -> None:
    keeper = merged_keeper()
    keeper.intend([entry("t")], 5.0)
    keeper.appended(EpochKey(1, NONCE), [entry("t")])
    assert not isinstance(keeper.next_step(head(0), 10.0), Add)
    keeper.read([(Position(1, 1, NONCE), entry("t"))])
    assert keeper._added == {}
