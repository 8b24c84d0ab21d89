"""Runs a region's keeper: reads the log as the mirror does, stores it, and carries out what the keeper decides.

Two threads and the event loop take part, one at a time under a lock: the mirror's thread hands on what it reads and
asks for the next step, a thread of the pool stores writers' intents, and the loop talks to the primary. Reports go out
without waiting for the answers to earlier ones, because far from the primary an answer takes as long as everything else
together; other steps go out one at a time. A step that fails is decided again at the next round.

While the disk cannot be written, what was read is kept in memory and nothing is reported: *held* means on disk. It is
kept no longer than the reading that showed it, because a later one may be of a history that lacks it.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any, Final, NamedTuple, TypeVar

import structlog

from verifier.log import FORMAT, Entry, Epoch, EpochLink, Position
from verifier.mirroring import LogListener, Round

from .core.epochs import founders
from .core.evidence import EpochKey, LogHead, Protocol, Report, key_of
from .core.keepers import Add, Bump, Keeper, Register, Send, Step
from .errors import KeeperUnavailable, StartError, StoreError
from .evidence import Evidence, read_evidence
from .keeper_disk import SqliteDisk
from .limits import (
    APPEND_ENTRIES_MAX,
    INTENT_GRACE_S,
    KEEPER_ALIVE_S,
    KEEPER_UNSAVED_MAX,
    REPORT_INTERVAL_S,
    REPORT_REPEAT_S,
    REPORTS_UNANSWERED_MAX,
)
from .store import Node
from .telemetry import Metrics, version
from .trust import TrustLog

__all__ = ["KeeperRunner"]

T = TypeVar("T")
_log: Final = structlog.get_logger(__name__)


_Waiting = tuple[Sequence[Entry], asyncio.Future[list[Entry | None]]]
"""Entries to store, and who waits for that."""


class _Sent(NamedTuple):
    report: Report
    mono: float


async def _nothing() -> bool:
    return True


class KeeperRunner(LogListener):
    """The region's keeper at work; also :class:`~keyservice.intents.Intents` for writers in this process."""

    def __init__(
        self,
        disk: SqliteDisk,
        trust: TrustLog,
        own: Node,
        primary: Node,
        metrics: Metrics,
        *,
        region: str,
        regions: Sequence[str],
        bootstrap_region: str | None,
        drop_grace_s: float,
        clock: Callable[[], float],
    ) -> None:
        self.disk = disk
        self.problem: str | None = None
        """Why nothing is reported, or None: ``keeper_disk``, ``log_format_newer``, ``region_has_keeper``."""
        self.before_merging: Callable[[], Awaitable[bool]] = _nothing
        """Puts back what else a log lacks; False if that did not work. Raises :class:`StoreError`."""
        self._aside_until_mono = 0.0
        self._trust, self._own, self._primary, self._metrics = trust, own, primary, metrics
        self._region, self._regions, self._bootstrap_region = region, tuple(regions), bootstrap_region
        self._drop_grace_s, self._clock = drop_grace_s, clock
        self._protocol = Protocol()
        self._lock = threading.Lock()
        self._keeper = Keeper(region, disk)
        self._begun = True
        self._unsaved: list[tuple[Position, Entry]] = []
        self._head: LogHead | None = None
        self._absent = False
        self._beat_at_ms: int | None = None
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="keeper")
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._stepping = False
        self._identified = False
        self._copied_from: str | None = None
        self._reporting = 0
        self._sent: _Sent | None = None
        self._report_due: asyncio.TimerHandle | None = None
        self._waiting: list[_Waiting] = []
        self._storing = False

    # -- life -----------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Make sure that this is the region's only keeper, as far as can be seen; raises :class:`StartError`.

        Both servers are asked: a primary that lags behind does not know what this keeper reported last.
        """
        self._loop = asyncio.get_running_loop()
        for node in (self._own, self._primary):
            with suppress(StoreError):
                await self._identify(node)

    async def stop(self) -> None:
        """End what is under way, and close the disk."""
        self._loop = None
        if self._report_due is not None:
            self._report_due.cancel()
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        self._executor.shutdown(wait=True)
        with self._lock:
            self.disk.close()

    @property
    def merged(self) -> EpochKey | None:
        """The epoch that it is merged into and reports in, or None."""
        return self._keeper.merged

    @property
    def seated(self) -> bool | None:
        """Whether this keeper votes in the epoch that its region's server shows; None while that is not known."""
        head = self._head
        if head is None:
            return None
        return self._protocol.voters(head.epoch).get(self._region) == self.disk.keeper_id

    def show(self) -> None:
        """Set the metrics that are states."""
        head = self._head
        self._metrics.keeper_merged.set(head is not None and self.merged == key_of(head.epoch))
        self._metrics.keeper_entries.set(self.disk.count)
        self._metrics.keeper_pending.set(self._keeper.pending)

    # -- what the mirror hears, on its thread -----------------------------------------------------------------------

    def begin(self) -> None:
        """The log will be read from its first entry: what can matter no more is not put back into it."""
        with self._lock:
            with suppress(KeeperUnavailable):  # said by the next write
                self._drop_expired()
            self._save()
            self._unsaved.clear()  # shown by another reading, perhaps of another history: this one has yet to show it
            self._head, self._absent = None, False
            self._begin()

    def _begin(self) -> None:
        """A disk that cannot be read keeps the keeper from taking part, and this process's mirror from nothing."""
        try:
            self._keeper.begin()
        except KeeperUnavailable as error:
            self._begun, self.problem = False, error.code
        else:
            self._begun = True

    def entries(self, accepted: list[tuple[Position, Entry]]) -> None:
        """Entries to store."""
        with self._lock:
            if self._begun:
                self._unsaved += accepted
                self._save()

    def round(self, state: Round) -> None:
        """The log was read to its end: time for the next step."""
        with self._lock:
            if not self._begun:
                if not self.disk.readable:
                    return
                raise KeeperUnavailable("keeper_disk", "the keeper's disk can be read again, so the log has to be")
            holed = not state.gaps <= state.epoch.holes  # whoever starts now lacks what was in one that is not named
            trimmed_to = state.meta.trimmed_to
            head = LogHead(state.epoch, state.beat, state.position, holed, trimmed_to, state.gaps, state.at_end)
            if not self._save(state, head.links):
                return
            self._head = head
            self.problem = self._why_not(state)
            self._beat_at_ms = self._beat_at_ms if state.beat is None else state.beat.at_ms
            step = self._next_step()
        self._soon(partial(self._act, step))

    def absent(self) -> None:
        """The region's server holds no log."""
        with self._lock:
            self._head, self._absent = None, True
            if self._begun:
                self.problem = self._why_not()
            step = self._next_step()
        self._soon(partial(self._act, step))

    def _why_not(self, state: Round | None = None) -> str | None:
        """What keeps this keeper from taking part, though everything is stored."""
        if time.monotonic() < self._aside_until_mono:
            return "region_has_keeper"
        return "log_format_newer" if state is not None and state.meta.min_reader_format > FORMAT else None

    def _next_step(self) -> Step | None:
        if self.problem is not None or (self._head is None and not self._absent):
            return None
        try:
            return self._keeper.next_step(self._head, time.monotonic())
        except KeeperUnavailable as error:
            self.problem = error.code
            return None

    def _save(self, state: Round | None = None, links: tuple[EpochLink, ...] = ()) -> bool:
        """Store what was read; False if the disk does not take it now."""
        try:
            if self._unsaved or links:
                self._keeper.read(self._unsaved, links)
            if state is not None:
                self.disk.raise_min_reader_format(state.meta.min_reader_format)
        except KeeperUnavailable as error:
            if self.problem != error.code:
                _log.error("keeper cannot store", code=error.code, error=str(error))
            self.problem = error.code
            if len(self._unsaved) > KEEPER_UNSAVED_MAX:
                self._unsaved.clear()
                raise  # the mirror then reads again from the first entry, and so does the keeper
            return False
        self._unsaved.clear()
        return True

    def _soon(self, call: Callable[[], None]) -> None:
        loop = self._loop
        if loop is not None:
            with suppress(RuntimeError):  # the loop is closing
                loop.call_soon_threadsafe(call)

    # -- steps, on the loop -----------------------------------------------------------------------------------------

    async def _decide(self) -> None:
        """Between two rounds: carry out what the keeper wants now."""
        self._act(await self.in_thread(self._next_step))

    def _act(self, step: Step | None) -> None:
        if self._loop is None:
            return
        if isinstance(step, Send):
            self._send(step.report)
        elif step is not None and not self._stepping:
            self._stepping = True
            self._spawn(self._carry_out(step))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _carry_out(self, step: Step) -> None:
        again = False
        try:
            if not self._identified:
                await self._identify(self._primary)
            again = await self._take(step)
        except (StoreError, KeeperUnavailable) as error:
            _log.info("keeper's step not taken", step=type(step).__name__, code=error.code)
        except StartError as error:
            self._stand_aside(str(error))
        finally:
            self._stepping = False
        if again:
            await self._decide()

    def _stand_aside(self, why: str) -> None:
        self._aside_until_mono = time.monotonic() + KEEPER_ALIVE_S
        _log.error("keeper stands aside", code="region_has_keeper", error=why)

    async def _take(self, step: Step) -> bool:
        """True if there may be something to do at once."""
        if isinstance(step, Register):
            await self._register(step)
        elif isinstance(step, Bump):
            if await self._trust.bump(step, min_reader_format=self.disk.min_reader_format):
                _log.warning("keeper began an epoch", above=step.above, voters=dict(step.voters))
        elif isinstance(step, Add):
            if self.merged != step.seen and not await self.before_merging():
                return False
            beat_n = await self._trust.add(step)
            if step.entries:
                _log.info("keeper added entries", count=len(step.entries), epoch=step.seen.number)
            await self.in_thread(lambda: self._keeper.added(step, beat_n, time.monotonic()))
            return True
        return False

    async def _register(self, step: Register) -> None:
        """Claim the region's seat in a log that does not exist yet, and begin it if that is for this region to do."""
        if await self._trust.register(step.keeper_id):
            registered = await self._trust.registered(self._regions)
            voters = founders(self._region, self._regions, self._bootstrap_region, registered)
            if voters is not None:
                await self._trust.bump(Bump(0, None, voters))

    async def _identify(self, node: Node) -> None:
        """Is somebody else this region's keeper, and is this disk the one that it was? Raises :class:`StartError`."""
        evidence = await read_evidence(node, (self._region,))
        report = evidence.reports.get(self._region)
        if report is not None and report.keeper_id not in (self.disk.keeper_id, self._copied_from):
            age_s = await self._age_s(node, evidence)
            if abs(age_s) <= KEEPER_ALIVE_S:  # a clock that was wild once must not keep everybody out
                message = (
                    f"keeper {report.keeper_id} of this region reported {age_s:.1f} s ago: a region has exactly one"
                )
                raise StartError("region_has_keeper", f"{message}; stop it, and wait {KEEPER_ALIVE_S:g} s")
        if self._protocol.is_copy(report, self.disk.keeper_id, self.disk.opened_commit):
            old = self._copied_from = self.disk.keeper_id
            await self.in_thread(self.disk.become_another)
            _log.error("this disk is an old copy: the keeper takes a new id", old=old, new=self.disk.keeper_id)
        if node is self._primary:
            self._identified = True

    async def _age_s(self, node: Node, evidence: Evidence) -> float:
        seconds, microseconds = await node.write("TIME")
        return int(seconds) + int(microseconds) / 1e6 - evidence.at_ms[self._region] / 1000

    # -- reports ----------------------------------------------------------------------------------------------------

    def _send(self, report: Report) -> None:
        """Send it unless it was just sent; a burst of them becomes one."""
        now, sent = time.monotonic(), self._sent
        if sent is not None and sent.report == report and now - sent.mono < REPORT_REPEAT_S:
            return
        if self._report_due is not None:
            return
        soon_s = 0.0 if sent is None else sent.mono + REPORT_INTERVAL_S - now
        if self._reporting >= REPORTS_UNANSWERED_MAX or soon_s > 0:
            assert self._loop is not None
            self._report_due = self._loop.call_later(max(soon_s, REPORT_INTERVAL_S), self._report_again)
            return
        self._sent = _Sent(report, now)
        self._reporting += 1
        self._spawn(self._report(report))

    def _report_again(self) -> None:
        self._report_due = None
        self._spawn(self._decide())

    async def _report(self, report: Report) -> None:
        outcome = "sent"
        try:
            await self._trust.report(report, version())
        except StoreError as error:
            outcome = error.code
            self._sent = None
            if error.code == "TRUST_KEEPER":
                self._stand_aside("another keeper of this region reports: a region has exactly one")
        finally:
            self._reporting -= 1
            self._metrics.keeper_reports.labels(outcome).inc()

    # -- opening ----------------------------------------------------------------------------------------------------

    async def once(self) -> None:
        """One round beside the mirror's: open the epoch if enough keepers have merged into it."""
        head = self._head
        if head is None or head.epoch.open or self.problem is not None:
            return
        try:
            evidence = await self.evidence(head.epoch)
            epoch = evidence.epoch
            if epoch is None or epoch.open or not self._protocol.may_open(epoch, evidence.reports.values()):
                return
            if await self._trust.open_epoch(key_of(epoch)):
                _log.info("epoch opened", number=epoch.number)
        except StoreError as error:
            _log.info("epoch not opened", code=error.code)

    async def evidence(self, epoch: Epoch) -> Evidence:
        """What every region's keeper has reported, as the own region's server shows it; raises :class:`StoreError`."""
        return await read_evidence(self._own, tuple(dict.fromkeys((*self._regions, *self._protocol.voters(epoch)))))

    async def trims(self) -> bool:
        """Whether trimming the log is for this keeper to do: the first, by region, of the voters that are merged.

        Raises :class:`StoreError`.
        """
        head = self._head
        if head is None or not head.epoch.open or self.problem is not None:
            return False
        merged = self._protocol.merged_ids(head.epoch, (await self.evidence(head.epoch)).reports.values())
        seated = sorted((region, seat) for region, seat in self._protocol.voters(head.epoch).items() if seat in merged)
        return bool(seated) and seated[0] == (self._region, self.disk.keeper_id)

    async def drop_expired(self) -> None:
        """Forget entries that can matter no more."""
        with suppress(KeeperUnavailable):  # said by the next write
            await self.in_thread(self._drop_expired)

    def _drop_expired(self) -> None:
        """By this clock and by the newest beat's, so that one clock alone brings nothing back."""
        if self._beat_at_ms is not None:
            self.disk.drop_expired(min(self._clock(), self._beat_at_ms / 1000) - self._drop_grace_s)

    # -- writers' intents -------------------------------------------------------------------------------------------

    async def intend(self, entries: Sequence[Entry]) -> list[Entry | None]:
        """See :class:`~keyservice.intents.Intents`. Those that come while the disk is busy share one commit."""
        done: asyncio.Future[list[Entry | None]] = asyncio.get_running_loop().create_future()
        self._waiting.append((entries, done))
        if not self._storing:
            self._storing = True
            self._spawn(self._store_waiting())
        return await done

    async def _store_waiting(self) -> None:
        try:
            while self._waiting:
                batch, self._waiting = self._waiting, []
                await self._store_batch(batch)
        finally:
            self._storing = False

    async def _store_batch(self, batch: list[_Waiting]) -> None:
        wanted = [entry for entries, _ in batch for entry in entries]
        try:
            before = iter(await self.in_thread(lambda: self._intend(wanted)))
        except Exception as error:  # noqa: BLE001  # whatever it is, those who wait for it are told
            for _, done in batch:
                if not done.done():
                    done.set_exception(error)
            return
        for entries, done in batch:
            found = [next(before) for _ in entries]
            if not done.done():  # its request may be gone
                done.set_result(found)

    def _intend(self, entries: Sequence[Entry]) -> list[Entry | None]:
        held = self.disk.find_all([entry.id for entry in entries])
        before: list[Entry | None] = []
        new: list[Entry] = []
        for entry in entries:
            before.append(held.get(entry.id))
            if before[-1] is None:
                held[entry.id] = entry
                new.append(entry)
        if new:
            chunks = 1 + len(new) // APPEND_ENTRIES_MAX  # which the writer appends one after the other
            self._keeper.intend(new, time.monotonic() + INTENT_GRACE_S * chunks)
        return before

    async def appended(self, epoch: EpochKey, entries: Sequence[Entry]) -> None:
        """See :class:`~keyservice.intents.Intents`."""
        await self.in_thread(lambda: self._keeper.appended(epoch, entries))

    async def given_up(self, entries: Sequence[Entry]) -> None:
        """See :class:`~keyservice.intents.Intents`."""
        await self.in_thread(lambda: self._keeper.given_up(entries))
        await self._decide()

    async def find(self, entry_id: str) -> Entry | None:
        """See :class:`~keyservice.intents.Intents`."""
        found = await self.in_thread(lambda: self.disk.find_all([entry_id]))
        return found.get(entry_id)

    async def close(self) -> None:
        """Nothing: :meth:`stop` ends it."""

    async def in_thread(self, work: Callable[[], T]) -> T:
        """Run it on the keeper's thread, under the lock: it waits for the disk."""

        def locked() -> T:
            with self._lock:
                return work()

        return await asyncio.get_running_loop().run_in_executor(self._executor, locked)
