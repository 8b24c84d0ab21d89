"""What runs beside the requests, in every instance alike.

* the beat: an asyncio task, several times a second; it also compares the clocks;
* the key poll: an asyncio task that asks the region's replica for the key set's generation, and reads it if changed;
* the rotator: an APScheduler job, and at once when one of the region's keys is revoked.

Each goes on for ever: an outage is counted and shown, and ends no task, and neither does a mistake of ours: it is
logged with its trace, and the next round is run.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Final

import structlog
from apscheduler.schedulers.asyncio import AsyncIOScheduler
from redis.exceptions import RedisError

from verifier.log import EPOCH_KEY

from .core.clocks import primary_is_off
from .errors import ClockSkewed, StoreError
from .keeper import KeeperRunner
from .limits import BEAT_TIMEOUT_S, KEYS_POLL_S, SKEW_PROBE_S
from .rotator import KEEPER_NOT_MERGED, Rotator
from .store import Node
from .telemetry import Metrics
from .trimming import Trimmer
from .trust import KeysView, TrustLog, read_keys

__all__ = ["Beats", "KeyPoll", "RotationJob", "TrimJob", "end", "repeat"]

_log: Final = structlog.get_logger(__name__)


async def repeat(once: Callable[[], Awaitable[None]], pause_s: Callable[[], float], stopping: asyncio.Event) -> None:
    """Run ``once`` every ``pause_s()`` seconds, counted from start to start, until ``stopping`` is set.

    Cancelling alone would not do: ``wait_for`` of Python 3.11, which redis-py uses, can lose a cancellation.
    """
    while not stopping.is_set():
        next_mono = time.monotonic() + pause_s()
        try:
            await once()
        except Exception:  # noqa: BLE001  # logged; a beat or key poll that ends silently is worse than any mistake
            _log.exception("a round failed; going on")
        with suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, next_mono - time.monotonic())):
                await stopping.wait()


async def end(tasks: Collection[asyncio.Task[None]]) -> None:
    """Cancel tasks and wait for their end; one that loses the cancellation ends with its round."""
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks)


def certain_skew_s(sent_at: float, server_at: float, now: float) -> float:
    """Own clock minus the server's, which read ``server_at`` between ``sent_at`` and ``now``: the least that it can be.

    A slow exchange says little: a stall of this process or of the server is no clock that is off.
    """
    doubt_s = max(0.0, now - sent_at) / 2
    skew_s = (sent_at + now) / 2 - server_at
    return math.copysign(max(0.0, abs(skew_s) - doubt_s), skew_s)


class Beats:
    """Beats in the current epoch, and knows how far this machine's clock is from the primary's."""

    def __init__(
        self,
        trust: TrustLog,
        metrics: Metrics,
        *,
        regions: Callable[[], Collection[str]],
        interval_ms: int,
        max_skew_s: float,
        clock: Callable[[], float],
    ) -> None:
        self._trust = trust
        self._regions = regions
        self._told = False
        self.primary_off = False
        """Whether the clocks differ, and a majority of regions say that it is the primary's that is wrong."""
        self._metrics = metrics
        self._interval_ms = interval_ms
        self._max_skew_s = max_skew_s
        self._clock = clock
        self.skew_s: float | None = None
        """Own clock minus the primary's, the least it can be by the last answer; None before the first."""
        self.problem: str | None = "not_started"
        """Why the last beat did not get through, or None."""

    @property
    def clocks_differ(self) -> bool:
        """Whether this clock and the primary's differ by more than ``max_skew_s``: then nobody beats or trims here."""
        return self.skew_s is not None and abs(self.skew_s) > self._max_skew_s

    @property
    def clock_skewed(self) -> bool:
        """Whether it is this clock that is wrong, as far as anybody can tell: then neither sign nor revoke."""
        return self.clocks_differ and not self.primary_off

    def check_clock(self) -> None:
        """Raise :class:`ClockSkewed` while this clock is taken for wrong."""
        if self.skew_s is not None and self.clock_skewed:
            raise ClockSkewed(self.skew_s)

    def pause_s(self) -> float:
        """Seconds from one round to the next."""
        return SKEW_PROBE_S if self.clocks_differ else self._interval_ms / 1000

    async def once(self) -> None:
        """One round: measure the clocks, and beat if they agree."""
        try:
            async with asyncio.timeout(BEAT_TIMEOUT_S):
                outcome = await self._measure_and_beat()
        except TimeoutError:
            outcome = self._fail("timeout")
        except StoreError as error:
            outcome = self._fail(error.code)
        self._metrics.beats.labels(outcome).inc()
        self._metrics.primary_up.set(self.problem is None)

    async def _measure_and_beat(self) -> str:
        sent_at = self._clock()
        if self.skew_s is None or self.clocks_differ:
            server_ms = await self._trust.server_ms()
            if not self._agree(sent_at, server_ms):
                return self._fail(await self._whose_clock(server_ms))
        await self._untell()
        sent_at = self._clock()
        written, server_ms = await self._trust.beat(self._interval_ms)
        if not self._agree(sent_at, server_ms):
            return self._fail(await self._whose_clock(server_ms))
        if self.problem is not None:
            _log.info("beating", written=written)
            self.problem = None
            await self._trust.warm()
        return "written" if written else "young_enough"

    def _agree(self, sent_at: float, server_ms: int) -> bool:
        """Compare the clocks: the server's was read at some time between sending and now."""
        self.skew_s = certain_skew_s(sent_at, server_ms / 1000, self._clock())
        self._metrics.skew.set(self.skew_s)
        return not self.clocks_differ

    async def _whose_clock(self, server_ms: int) -> str:
        """Say what this region sees, hear what the others do, and name whose clock is wrong."""
        assert self.skew_s is not None
        self._told = True
        sightings = await self._trust.tell_skew(self.skew_s, server_ms, self._regions())
        self.primary_off = primary_is_off(self.skew_s, sightings, self._regions(), self._max_skew_s)
        return "primary_clock" if self.primary_off else "clock_skew"

    async def _untell(self) -> None:
        if self._told:
            await self._trust.forget_skew()
        self._told = self.primary_off = False

    def _fail(self, code: str) -> str:
        if code != self.problem:
            _log.warning("no beat", code=code)
        self.problem = code
        return code


class KeyPoll:
    """Reads the key set from the region's replica whenever it changed, and hands it to whoever holds keys.

    Each of ``takers`` says whether it is done with a reading; one that is not gets the next one all the same. They are
    waited for, so one that writes to the primary has a poll of its own. While the replica is away the primary is asked:
    the set is then no older than the replica's would be.
    """

    def __init__(
        self,
        replica: Node,
        primary: Node,
        takers: Sequence[Callable[[KeysView], Awaitable[bool]]],
        metrics: Metrics,
        *,
        region: str,
    ) -> None:
        self._replica = replica
        self._primary = primary
        self._read_mono: float | None = None
        self._takers = takers
        self._metrics = metrics
        self._region = region
        self._taken: object = None
        self.problem: str | None = None

    @property
    def silence_s(self) -> float:
        """Seconds since the key set was read last, from whichever server; infinite before the first time."""
        return math.inf if self._read_mono is None else time.monotonic() - self._read_mono

    async def once(self) -> None:
        """Take over the keys if the generation is another one than the last time."""
        code = await self._read(self._replica)
        if code is not None and code != self.problem:
            _log.warning("key set not read", code=code)
        if code is not None:
            await self._read(self._primary)
        self.problem = code

    async def _read(self, node: Node) -> str | None:
        """None if that server's set was taken over, else why not. What a taker does with it has no part in that."""
        own, started_mono, view = node is self._replica, time.monotonic(), None
        try:
            async with asyncio.timeout(BEAT_TIMEOUT_S):
                version = own, *await node.redis.hmget(EPOCH_KEY, ["number", "nonce", "keys_n"])
                if version != self._taken:
                    view = replace(await read_keys(node, self._region), from_own=own)
        except (StoreError, RedisError, OSError, TimeoutError) as error:
            return error.code if isinstance(error, StoreError) else "replica_unreachable"
        if view is not None:
            done = [await take(view) for take in self._takers]
            self._taken = version if all(done) else None
            self._show(view)
        self._read_mono = started_mono
        return None

    def _show(self, view: KeysView) -> None:
        self._metrics.generation.set(view.generation.n)
        self._metrics.keys.clear()
        for record in view.records.values():
            self._metrics.keys.labels(record.region, record.state).inc()


class TrimJob:
    """Cuts the log shorter now and then, where that is for this region's keeper to do."""

    def __init__(self, runner: KeeperRunner, trimmer: Trimmer, beats: Beats, metrics: Metrics) -> None:
        self._runner = runner
        self._trimmer = trimmer
        self._beats = beats
        self._metrics = metrics

    async def once(self) -> None:
        """One run; a clock that is off must not decide what has expired."""
        outcome = "more"
        try:
            if self._beats.clocks_differ or not await self._runner.trims():
                return
            while outcome == "more":
                done = await self._trimmer.once()
                outcome = done.outcome
                self._metrics.trimmed.inc(done.removed - done.carried)
                if done.removed:
                    _log.info("trust log trimmed", removed=done.removed, carried=done.carried)
        except StoreError as error:
            outcome = error.code
        self._metrics.trim_runs.labels(outcome).inc()


class RotationJob:
    """Runs the rotator by schedule, and now when asked to."""

    def __init__(self, rotator: Rotator, metrics: Metrics, *, tick_s: float) -> None:
        self._rotator = rotator
        self._metrics = metrics
        self._tick_s = tick_s
        self._scheduler = AsyncIOScheduler(timezone="UTC")
        self._now: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Schedule it; to be called on the event loop."""
        self._scheduler.add_job(
            self._due, "interval", seconds=self._tick_s, id="rotate", coalesce=True, max_instances=1
        )
        self._scheduler.start()
        self.wake()

    async def _due(self) -> None:
        """A run, unless one is under way: far from the primary it takes longer than a short tick, which is no fault."""
        if not self._now:
            self.wake()

    def _again(self) -> None:
        if self._scheduler.running and not self._now:
            self.wake()

    def wake(self) -> None:
        """Run once more, soon; to be called on the event loop."""
        task = asyncio.get_running_loop().create_task(self.once())
        self._now.add(task)
        task.add_done_callback(self._now.discard)

    async def once(self) -> None:
        """One run; an outage is the next run's business."""
        try:
            await self._rotator.tick()
            outcome = self._rotator.problem or "done"
        except StoreError as error:
            outcome = error.code
        except Exception:  # noqa: BLE001  # logged, and counted
            _log.exception("a run of the rotator failed; going on")
            outcome = "failed"
        self._metrics.rotation_runs.labels(outcome).inc()
        if outcome == KEEPER_NOT_MERGED and self._scheduler.running:
            asyncio.get_running_loop().call_later(KEYS_POLL_S, self._again)

    async def stop(self) -> None:
        """End the schedule and whatever runs."""
        if self._scheduler.running:
            self._scheduler.shutdown(wait=False)
        await end(list(self._now))
