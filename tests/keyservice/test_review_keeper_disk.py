"""A keeper whose disk fails: nothing is forgotten that was acknowledged, and nobody waits for an answer for ever."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from keyservice.core.keepers import Add, Bump
from keyservice.errors import KeeperUnavailable
from keyservice.keeper import KeeperRunner
from keyservice.keeper_disk import SqliteDisk
from keyservice.telemetry import Metrics
from verifier.log import Entry, Epoch, EpochLink, Generation, Meta, Position
from verifier.mirroring import Round

ONE, TWO = "1" * 16, "2" * 16


def entry(value: str) -> Entry:
    return Entry(value, "jti", "https://id.test", value, None, 4_102_444_800, "r" * 200, 1, "eu")


def shown(number: int, nonce: str, previous: str | None, position: Position) -> Round:
    """What a server shows whose history begins with this epoch."""
    link = EpochLink(number, nonce, previous, {"eu": "k"}, False)
    epoch = Epoch(number, nonce, "r", False, Generation(number, 0), (link,))
    return Round(epoch, Meta("i", None, 1, 1, 86_400), None, position, None)


def fill(disk: SqliteDisk) -> None:
    """The disk is full: SQLite may not make its file any larger."""
    (pages,) = disk._db.execute("PRAGMA page_count").fetchone()
    disk._db.execute(f"PRAGMA max_page_count = {pages}")


def make_room(disk: SqliteDisk) -> None:
    disk._db.execute("PRAGMA max_page_count = 1000000")


@pytest.fixture
def disk(run_dir: Path) -> Iterator[SqliteDisk]:
    disk = SqliteDisk(run_dir / "keeper", region="eu")
    yield disk
    disk.close()


def runner_on(disk: SqliteDisk) -> KeeperRunner:
    nobody = cast(Any, None)
    settings: dict[str, Any] = {"region": "eu", "regions": ["eu"], "bootstrap_region": None, "drop_grace_s": 300}
    return KeeperRunner(disk, nobody, nobody, nobody, Metrics("eu"), clock=lambda: 1_000.0, **settings)


def problem_of(runner: KeeperRunner) -> str | None:
    return runner.problem


def test_what_another_reading_showed_while_the_disk_was_full_is_still_put_back(
    disk: SqliteDisk,
) -> None:
    runner = runner_on(disk)
    acknowledged = entry("acknowledged")
    runner.begin()
    runner.entries([(Position(1, 1, ONE), acknowledged)])
    fill(disk)
    runner.begin()
    many = [(Position(1, seq, ONE), entry(f"new-{seq}")) for seq in range(2, 200)]
    runner.entries([(Position(1, 1, ONE), acknowledged), *many])
    assert problem_of(runner) == "keeper_disk"
    runner.begin()  # another server, whose history lacks all that
    make_room(disk)
    runner.round(shown(2, TWO, None, Position(2, 0, TWO)))
    step = runner._next_step()
    assert isinstance(step, Add)
    assert acknowledged in step.entries


def test_a_disk_that_cannot_be_read_keeps_the_mirror_from_nothing_and_is_read_again_when_it_is_back(
    disk: SqliteDisk,
) -> None:
    runner = runner_on(disk)
    disk.store([entry("held")], ())
    disk._db.execute("ALTER TABLE entries RENAME TO away")  # stands for a page that is gone
    runner.begin()
    runner.entries([(Position(1, 1, ONE), entry("t"))])
    runner.round(shown(1, ONE, None, Position(1, 1, ONE)))
    assert problem_of(runner) == "keeper_disk"
    assert runner._next_step() is None
    disk._db.execute("ALTER TABLE away RENAME TO entries")
    with pytest.raises(KeeperUnavailable):  # the mirror's sign to begin anew
        runner.round(shown(1, ONE, None, Position(1, 1, ONE)))
    runner.begin()
    runner.entries([(Position(1, 1, ONE), entry("t"))])
    runner.round(shown(1, ONE, None, Position(1, 1, ONE)))
    assert problem_of(runner) is None
    step = runner._next_step()
    assert isinstance(step, Add)
    assert step.entries == (entry("held"),)


def test_a_keeper_that_could_not_store_still_brings_back_a_log_that_is_gone(disk: SqliteDisk) -> None:
    runner = runner_on(disk)
    runner.begin()
    runner.round(shown(1, ONE, None, Position(1, 0, ONE)))
    fill(disk)
    runner.entries([(Position(1, seq, ONE), entry(f"new-{seq}")) for seq in range(1, 200)])
    assert problem_of(runner) == "keeper_disk"
    runner.absent()
    assert problem_of(runner) is None
    assert isinstance(runner._next_step(), Bump)


async def test_a_disk_that_cannot_be_read_refuses_an_intent_by_name(run_dir: Path) -> None:
    disk = SqliteDisk(run_dir / "broken", region="eu")
    runner = runner_on(disk)
    try:
        disk._db.execute("DROP TABLE entries")  # stands for a page that is gone
        with pytest.raises(KeeperUnavailable) as caught:
            async with asyncio.timeout(10):
                await runner.intend([entry("t")])
        assert caught.value.code == "keeper_disk"
        with pytest.raises(KeeperUnavailable):
            await runner.find("t")
    finally:
        await runner.stop()
