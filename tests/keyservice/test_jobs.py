"""What runs beside the requests goes on, whatever happens in one round."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import anyio
import pytest
from apscheduler.events import EVENT_JOB_EXECUTED, EVENT_JOB_MAX_INSTANCES
from structlog.testing import capture_logs

from keyservice.core.clocks import primary_is_off
from keyservice.jobs import RotationJob, certain_skew_s, repeat
from keyservice.telemetry import Metrics


async def test_a_round_that_fails_is_logged_and_the_next_one_is_run() -> None:
    stopping = asyncio.Event()
    rounds: list[int] = []

    async def once() -> None:
        rounds.append(len(rounds))
        if len(rounds) == 1:
            raise ZeroDivisionError
        stopping.set()

    with capture_logs() as logs:
        await repeat(once, lambda: 0.0, stopping)
    assert rounds == [0, 1]
    assert [line["log_level"] for line in logs] == ["error"]


class Rotator:
    """Its first run takes until it is allowed to end; later ones fail."""

    def __init__(self) -> None:
        self.problem = None
        self.runs = 0
        self.may_end, self.third = asyncio.Event(), asyncio.Event()

    async def tick(self) -> None:
        self.runs += 1
        await self.may_end.wait()
        if self.runs == 3:
            self.third.set()
        if self.runs > 1:
            raise ZeroDivisionError


async def test_a_run_that_takes_longer_than_a_tick_is_not_complained_about_and_not_doubled() -> None:
    rotator, job_events, three_ticks = Rotator(), list[int](), asyncio.Event()

    def on_event(event: Any) -> None:
        job_events.append(event.code)
        if len(job_events) == 3:
            three_ticks.set()

    job = RotationJob(cast(Any, rotator), Metrics("eu"), tick_s=0.1)
    job._scheduler.add_listener(on_event, EVENT_JOB_EXECUTED | EVENT_JOB_MAX_INSTANCES)
    job.start()
    with anyio.fail_after(60), capture_logs() as logs:
        await three_ticks.wait()
        assert EVENT_JOB_MAX_INSTANCES not in job_events
        assert rotator.runs == 1
        rotator.may_end.set()
        await rotator.third.wait()
    assert "error" in {line["log_level"] for line in logs}
    await job.stop()


@pytest.mark.parametrize(
    ("sent_at", "server_at", "now", "skew_s"),
    [
        (100.0, 100.0, 100.0, 0.0),
        (102.0, 100.0, 102.0, 2.0),
        (98.0, 100.0, 98.0, -2.0),
        (100.0, 100.0, 103.0, 0.0),  # a slow answer, or a stall of ours
        (100.0, 103.0, 103.0, 0.0),  # a slow question
        (100.0, 103.5, 103.0, -0.5),
        (100.0, 99.5, 103.0, 0.5),
        (103.0, 100.0, 100.0, 1.5),  # our clock was set back meanwhile
    ],
)
def test_clocks_differ_by_no_more_than_a_slow_exchange_leaves_no_doubt_about(
    sent_at: float, server_at: float, now: float, skew_s: float
) -> None:
    assert certain_skew_s(sent_at, server_at, now) == pytest.approx(skew_s)


@pytest.mark.parametrize(
    ("own_s", "others_s", "is_off"),
    [
        (30.0, (29.0, 0.0), True),
        (-30.0, (-31.0, 0.0), True),
        (30.0, (0.0, 0.0), False),
        (30.0, (-30.0, 0.0), False),
        (30.0, (19.5, 0.0), True),  # both clocks right, as far as clocks may differ, and a slow exchange
        (3e8, (6.0, 0.0), False),  # years ahead; one that is off by seconds speaks for nothing
        (3e8, (3e8, 0.0), True),
        (6.0, (3e8, 7.0), True),
    ],
)
def test_it_is_the_primarys_clock_where_a_majority_sees_it_off_alike(
    own_s: float, others_s: tuple[float, ...], is_off: bool
) -> None:
    sightings = dict(zip("abc", (own_s, *others_s), strict=True))
    assert primary_is_off(own_s, sightings, "abc", 5.0) is is_off


def test_two_regions_of_which_one_is_off_cannot_tell() -> None:
    assert not primary_is_off(30.0, {"a": 30.0}, "ab", 5.0)
    assert not primary_is_off(30.0, {"a": 30.0}, "a", 5.0)
    assert primary_is_off(30.0, {"a": 30.0, "b": 28.0}, "ab", 5.0)
    assert not primary_is_off(30.0, {"a": 30.0, "gone": 30.0}, "ab", 5.0)
