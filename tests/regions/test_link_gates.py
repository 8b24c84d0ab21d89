"""Closed addresses and isolated regions: the rules, and what callers of the real proxy see."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from regions.errors import LinkFailed
from regions.link import Proxy
from regions.link_control import LinkControl
from regions.link_gates import Gates, Passage
from regions.link_rules import LinkConfig, Listener, link_config
from regions.topology import Topology

Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]
PATIENCE_S = 60.0


def gates() -> Gates:
    listeners = [
        Listener("127.0.1.1", 7, "a", ""),
        Listener("127.0.1.1", 8, "a", ""),
        Listener("127.0.2.1", 7, "b", ""),
    ]
    regions = {"a": "127.0.1.", "b": "127.0.2.", "c": "127.0.3."}
    return Gates(LinkConfig(listeners, regions, [], ""))


def test_a_closed_address_refuses_callers_from_everywhere_and_no_other_does() -> None:
    some = gates()
    some.set_closed("a", 7, True)
    assert {some.passage(caller, "a", 7) for caller in "abc"} == {Passage.REFUSED}
    assert some.passage("b", "a", 8) is some.passage("a", "b", 7) is Passage.OPEN
    some.set_closed("a", 7, False)
    assert some.passage("b", "a", 7) is Passage.OPEN


def test_an_isolated_region_hears_nothing_and_says_nothing_and_the_others_go_on() -> None:
    some = gates()
    some.set_isolated("a", True)
    assert some.passage("b", "a", 7) is some.passage("a", "b", 7) is Passage.SILENT
    assert some.passage("a", "a", 7) is some.passage("c", "b", 7) is Passage.OPEN
    some.set_isolated("a", False)
    assert some.passage("b", "a", 7) is Passage.OPEN


def test_a_gate_that_does_not_exist_is_refused() -> None:
    with pytest.raises(LinkFailed, match="port 9"):
        gates().set_closed("a", 9, True)
    with pytest.raises(LinkFailed, match="mars"):
        gates().set_isolated("mars", True)


class Lab:
    """A proxy in front of an echo in region a, and callers of region b."""

    def __init__(self, topology: Topology, control: LinkControl) -> None:
        self.control = control
        self.port = topology.ports["redis"]
        self.writers: list[asyncio.StreamWriter] = []

    async def call(self) -> Stream:
        reader, writer = await asyncio.open_connection("127.0.1.1", self.port, local_addr=("127.0.2.1", 0))
        self.writers.append(writer)
        return reader, writer

    async def close(self, closed: bool) -> None:
        await asyncio.to_thread(self.control.set_closed, "a", self.port, closed)

    async def isolate(self, isolated: bool) -> None:
        await asyncio.to_thread(self.control.set_isolated, "a", isolated)


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(1024):
            writer.write(data)
    writer.close()


@pytest.fixture
async def lab(run_dir: Path, topology_with: Callable[..., Topology]) -> AsyncIterator[Lab]:
    topology = topology_with({})
    server = await asyncio.start_unix_server(echo, run_dir / "server.sock")
    config = link_config(topology, {("a", "redis"): run_dir / "server.sock"}, run_dir / "control.sock")
    made = Lab(topology, LinkControl(run_dir / "control.sock"))
    async with Proxy(config):
        yield made
        for writer in made.writers:
            writer.close()
        await asyncio.gather(*(writer.wait_closed() for writer in made.writers), return_exceptions=True)
    server.close()


async def echoes(stream: Stream) -> bool:
    reader, writer = stream
    try:
        writer.write(b"x")
        async with asyncio.timeout(PATIENCE_S):
            return await reader.read(1) == b"x"
    except ConnectionError:
        return False


async def test_closing_an_address_resets_its_connections_and_refuses_new_ones_until_it_opens(lab: Lab) -> None:
    before = await lab.call()
    assert await echoes(before)
    await lab.close(True)
    assert not await echoes(before)
    assert not await echoes(await lab.call())
    await lab.close(False)
    assert await echoes(await lab.call())


async def test_nothing_of_an_isolated_region_is_heard_and_its_old_connections_are_reset_when_it_is_back(
    lab: Lab,
) -> None:
    before = await lab.call()
    assert await echoes(before)
    await lab.isolate(True)
    during = await lab.call()
    waiting = [asyncio.create_task(echoes(stream)) for stream in (before, during)]
    done, _ = await asyncio.wait(waiting, timeout=0.3)
    assert not done
    await lab.isolate(False)
    assert await asyncio.gather(*waiting) == [False, False]
    assert await echoes(await lab.call())


async def test_no_fault_and_no_healing_of_links_changes_a_gate(lab: Lab) -> None:
    await lab.close(True)
    await asyncio.to_thread(lab.control.cut, "b")
    await asyncio.to_thread(lab.control.heal)
    assert not await echoes(await lab.call())
    await lab.close(False)
    await lab.isolate(True)
    during = asyncio.create_task(echoes(await lab.call()))
    await asyncio.to_thread(lab.control.down, "b", "a")
    await asyncio.to_thread(lab.control.heal)
    done, _ = await asyncio.wait([during], timeout=0.1)
    assert not done
    await lab.isolate(False)
    assert await during is False
    assert await echoes(await lab.call())
