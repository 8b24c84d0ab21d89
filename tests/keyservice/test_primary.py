"""The key service's primary, followed through Sentinels: the decision, and real ones."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from keyservice.errors import OutcomeUnknown, PrimaryUnreachable, Refused, SettingError
from keyservice.primary import SentinelNode, newest, primary_node
from keyservice.settings import Settings
from keyservice.store import Node
from regions.failover import Failover
from tests.keyservice.support import Server
from tests.regions.sentinel_lab import WITHIN_S, Lab, running_lab
from verifier.sentinel import Address, ServerSeen, Sighting, parse_sentinel_url

A, B = Address("127.0.1.1", 1), Address("127.0.2.1", 1)


def named(address: Address, epoch: int) -> Sighting:
    return Sighting(ServerSeen(address, frozenset({"master"})), epoch)


# -- the decision -----------------------------------------------------------------------------------------------------


def test_the_newest_configuration_epoch_is_followed() -> None:
    assert newest(None, [named(A, 1), named(B, 2)], 3) == named(B, 2)
    assert newest(named(A, 1), [named(B, 2)], 3) == named(B, 2)


def test_a_sentinel_that_is_behind_leads_nobody_back() -> None:
    assert newest(named(B, 2), [named(A, 1)], 3) == named(B, 2)
    assert newest(named(B, 2), [named(A, 1), named(B, 2), named(A, 1)], 3) == named(B, 2)


def test_of_equal_epochs_the_one_that_is_followed_stays_and_at_first_the_own_sentinel_is_believed() -> None:
    assert newest(named(A, 1), [named(B, 1)], 3) == named(A, 1)
    assert newest(None, [named(B, 1), named(A, 1)], 3) == named(B, 1)


def test_sentinels_that_were_set_up_anew_are_believed_once_a_majority_says_so() -> None:
    assert newest(named(B, 9), [named(A, 0), named(A, 0)], 3) == named(A, 0)
    assert newest(named(B, 9), [named(A, 0)], 3) == named(B, 9)


def test_no_answer_changes_nothing() -> None:
    assert newest(named(A, 1), [], 3) == named(A, 1)
    assert newest(None, [], 3) is None


# -- settings ---------------------------------------------------------------------------------------------------------


def test_a_fixed_address_stays_a_plain_node(make_settings: Callable[..., Settings]) -> None:
    settings = make_settings("redis://own:1", primary_url="redis://other:1")
    assert type(primary_node(settings)) is Node


def test_a_sentinel_url_makes_a_node_that_follows(make_settings: Callable[..., Settings]) -> None:
    settings = make_settings("redis://own:1", primary_url="redis+sentinel://h:1,i:2/trust")
    assert isinstance(primary_node(settings), SentinelNode)


def test_a_broken_sentinel_url_names_the_variable_and_repeats_nothing(make_settings: Callable[..., Settings]) -> None:
    with pytest.raises(SettingError, match="KEYSERVICE_PRIMARY_URL has a port") as refused:
        make_settings("redis://own:1", primary_url="redis+sentinel://me:secret@h:x/trust")
    assert "secret" not in str(refused.value)


def test_the_own_server_cannot_be_named_through_sentinels(make_settings: Callable[..., Settings]) -> None:
    with pytest.raises(SettingError, match="KEYSERVICE_REDIS_URL names Sentinels"):
        make_settings("redis+sentinel://h:1/trust")


# -- real servers -----------------------------------------------------------------------------------------------------


async def test_a_write_under_way_when_the_node_moves_is_unknown_at_once(
    start_server: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("keyservice.store.PRIMARY_TIMEOUT_S", 120.0)
    one, two = start_server("one"), start_server("two")
    node = Node(one.url)
    await node.write("SET", "k", "1")
    with one.stopped():
        waiting = asyncio.create_task(node.write("SET", "k", "2"))
        await asyncio.sleep(0.05)  # it is sent
        assert not waiting.done()
        began = time.monotonic()
        await node.move(two.url)
        with pytest.raises(OutcomeUnknown):
            await waiting
        assert time.monotonic() - began < 60  # the time-out of a write is twice that here
        assert await node.write("GET", "k") is None
    await node.close()


async def test_a_node_without_a_server_says_that_nothing_was_done() -> None:
    node = Node(None)
    with pytest.raises(PrimaryUnreachable):
        await node.write("SET", "k", "1")
    await node.close()


@pytest.fixture
def lab() -> Iterator[Lab]:
    with tempfile.TemporaryDirectory(prefix="kp-") as path, running_lab(Path(path)) as running:
        yield running


@pytest.fixture
async def node(lab: Lab) -> AsyncIterator[SentinelNode]:
    """As the key service of region b has it."""
    made = SentinelNode(
        parse_sentinel_url(lab.sentinel_url("b")),
        username="keyservice",
        password=lab.passwords["keyservice"],
        sentinel_username="watcher",
        sentinel_password=lab.sentinels.credentials.watcher,
        source_address=lab.topology.region("b").address,
    )
    yield made
    await made.close()


async def write_again(node: SentinelNode) -> int:
    """Write until one is acknowledged; how many were refused before that."""
    deadline = time.monotonic() + WITHIN_S
    failed = 0
    while True:
        try:
            await node.write("SET", "{ks}:k", "v")
            return failed
        except (PrimaryUnreachable, OutcomeUnknown, Refused):
            assert time.monotonic() < deadline, "no write gets through"
            failed += 1
        await asyncio.sleep(0.01)


def region_of(lab: Lab, node: SentinelNode) -> str:
    assert node.address is not None
    return next(region.name for region in lab.topology.regions if region.address == node.address.host)


async def test_writes_go_to_the_promoted_server_after_a_death_and_back_after_a_failover(
    lab: Lab, node: SentinelNode
) -> None:
    await node.check("KEYSERVICE_PRIMARY_URL")
    assert region_of(lab, node) == "a"
    assert await write_again(node) == 0
    await asyncio.to_thread(lab.kill_region, "a")
    assert await write_again(node) > 0
    promoted = region_of(lab, node)
    assert promoted in ("b", "c")
    await asyncio.to_thread(lab.return_region, "a")
    report = await asyncio.to_thread(Failover(lab.file(), "a").run)
    assert report.lost == 0
    await write_again(node)
    assert region_of(lab, node) == "a"
    assert set(lab.link.counters().unbound.values()) == {0}


async def test_the_own_regions_sentinel_is_not_needed(lab: Lab, node: SentinelNode) -> None:
    await asyncio.to_thread(lab.kill_sentinel, "b")
    await node.check("KEYSERVICE_PRIMARY_URL")
    await asyncio.to_thread(lab.kill_server, "a")
    assert await write_again(node) > 0
    assert region_of(lab, node) != "a"


async def test_with_no_sentinel_the_primary_that_is_known_is_kept(lab: Lab, node: SentinelNode) -> None:
    await node.check("KEYSERVICE_PRIMARY_URL")
    for region in ("a", "b", "c"):
        await asyncio.to_thread(lab.kill_sentinel, region)
    node.look_now()
    assert await write_again(node) == 0


async def test_before_any_sentinel_answers_nothing_is_done_and_that_is_said(lab: Lab, node: SentinelNode) -> None:
    for region in ("a", "b", "c"):
        await asyncio.to_thread(lab.kill_sentinel, region)
    with pytest.raises(PrimaryUnreachable, match="no Sentinel"):
        await node.check("KEYSERVICE_PRIMARY_URL")
    with pytest.raises(PrimaryUnreachable):
        await node.write("SET", "{ks}:k", "v")
