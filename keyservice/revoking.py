"""Writing revocations: check, have the region's keeper store them, append, enforce here at once, answer with receipts.

An entry is on the keeper's disk before it is appended. From then on nothing that goes wrong makes it *failed*: the
keeper sees to it that it gets into the log, and the receipt says ``pending`` until a majority of regions holds it.

An id that is stored already, in the log or by the keeper, is not stored again: the same request gets the stored entry,
another one a conflict. Two requests with one id at the same time are one after the other.

The times in an entry are this machine's: while its clock is known to be off, nothing is stored.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import structlog

from verifier.log import Entry

from .core.evidence import EpochKey
from .core.ids import uuid7
from .core.revocation import Draft, EntryIndex, RevocationPolicy, RevocationRequest, Stored, draft, entry_for
from .errors import KeeperUnavailable, KeyserviceError, OutcomeUnknown, RequestRefused, StoreError
from .intents import Intents
from .limits import APPEND_ENTRIES_MAX
from .receipts import Receipt, Receipts
from .telemetry import Metrics
from .trust import TrustLog

__all__ = ["Outcome", "Revoker"]

Outcome = Receipt | KeyserviceError
"""What became of one revocation: where it is stored, or why it is not."""

_log = structlog.get_logger(__name__)


class Revoker:
    """Writes revocations. ``enforce(entries)`` puts stored ones in force in this process.

    ``check_clock()`` raises :class:`ClockSkewed` while the clock is off.
    """

    def __init__(
        self,
        trust: TrustLog,
        intents: Intents,
        index: EntryIndex,
        receipts: Receipts,
        policy: RevocationPolicy,
        *,
        receipt_wait_s: float,
        clock: Callable[[], float],
        check_clock: Callable[[], None],
        enforce: Callable[[list[Entry]], None],
        metrics: Metrics,
    ) -> None:
        self._trust = trust
        self._intents = intents
        self._index = index
        self._receipts = receipts
        self._policy = policy
        self._receipt_wait_s = receipt_wait_s
        self._clock = clock
        self._check_clock = check_clock
        self._enforce = enforce
        self._metrics = metrics
        self._under_way: dict[str, asyncio.Event] = {}
        self._hints: set[asyncio.Task[None]] = set()

    def draft(self, request: RevocationRequest) -> Draft:
        """Check one request; raises :class:`RequestRefused`, :class:`ClockSkewed`."""
        self._check_clock()
        now = self._clock()
        return draft(request, uuid7(now), now, self._policy)

    async def revoke(self, wanted: Draft) -> Receipt:
        """One revocation; raises :class:`KeeperUnavailable`, :class:`RequestRefused`, :class:`ClockSkewed`."""
        (outcome,) = await self.revoke_all([wanted])
        if isinstance(outcome, KeyserviceError):
            raise outcome
        return outcome

    async def revoke_all(self, drafts: Sequence[Draft]) -> list[Outcome]:
        """Many revocations, each with its own outcome, in the order given, after one wait for all of them.

        Ids are claimed in their order, so that two requests never wait for each other. Raises :class:`ClockSkewed`.
        """
        outcomes: dict[int, Stored | KeyserviceError] = {}
        claimed: dict[int, Draft] = {}
        mine: set[str] = set()
        try:
            for place, wanted in sorted(enumerate(drafts), key=lambda item: item[1].id):
                known = _twice() if wanted.id in mine else await self._known(wanted)
                if known is not None:
                    outcomes[place] = known
                else:
                    claimed[place] = wanted
                    mine.add(wanted.id)
            outcomes.update(await self._store(claimed))
        finally:
            for wanted in claimed.values():
                self._under_way.pop(wanted.id).set()
        return await self._settle([outcomes[place] for place in range(len(drafts))])

    async def _settle(self, outcomes: list[Stored | KeyserviceError]) -> list[Outcome]:
        stored = [outcome for outcome in outcomes if isinstance(outcome, Stored)]
        receipts = await self._receipts.settle(stored, self._receipt_wait_s) if stored else []
        replicated = sum(receipt.replicated for receipt in receipts)
        self._metrics.count_receipts("replicated", replicated)
        self._metrics.count_receipts("pending", len(receipts) - replicated)
        following = iter(receipts)
        return [next(following) if isinstance(outcome, Stored) else outcome for outcome in outcomes]

    async def _known(self, wanted: Draft) -> Stored | KeyserviceError | None:
        """The outcome of an id that was seen before; None after claiming an id that was not."""
        while wanted.id in self._under_way:
            await self._under_way[wanted.id].wait()
        stored = self._index.get(wanted.id)
        if stored is None:
            self._under_way[wanted.id] = asyncio.Event()
            return None
        return stored if wanted.same_request(stored.entry) else _conflict()

    async def _store(self, claimed: dict[int, Draft]) -> dict[int, Stored | KeyserviceError]:
        """First on the keeper's disk, then into the log."""
        outcomes: dict[int, Stored | KeyserviceError] = {}
        entries: dict[int, Entry] = {}
        self._check_clock()
        now = self._clock()
        for place, wanted in claimed.items():
            try:
                entries[place] = entry_for(wanted, now, self._policy)
            except RequestRefused as refused:
                outcomes[place] = refused
        if not entries:
            return outcomes
        try:
            stored = await self._intents.intend(list(entries.values()))
        except KeeperUnavailable as error:
            self._metrics.count_append(error.code, len(entries))
            return outcomes | dict.fromkeys(entries, error)
        new: dict[int, Entry] = {}
        for (place, entry), before in zip(entries.items(), stored, strict=True):
            if before is None:
                new[place] = entry
            else:
                outcomes[place] = Stored(before, None) if claimed[place].same_request(before) else _conflict()
        return outcomes | await self._append(new)

    async def _append(self, entries: dict[int, Entry]) -> dict[int, Stored | KeyserviceError]:
        outcomes: dict[int, Stored | KeyserviceError] = {}
        places = list(entries)
        for start in range(0, len(places), APPEND_ENTRIES_MAX):
            chunk = places[start : start + APPEND_ENTRIES_MAX]
            outcomes.update(zip(chunk, await self._append_chunk([entries[place] for place in chunk]), strict=True))
        return outcomes

    async def _append_chunk(self, entries: list[Entry]) -> Sequence[Stored]:
        """What cannot be appended now is the keeper's to append: stored, its outcome open, never failed."""
        self._enforce(entries)
        try:
            stored = await self._trust.append(entries)
        except StoreError as error:
            self._metrics.count_append(error.code, len(entries))
            _log.warning("not appended yet; the keeper goes on", code=error.code, count=len(entries))
            if not isinstance(error, OutcomeUnknown):  # else the keeper first waits for it to show up in the log
                self._hint(self._intents.given_up(entries))
            return [Stored(entry, None) for entry in entries]
        self._metrics.count_append("appended", len(entries))
        self._index.add((one.position, one.entry) for one in stored if one.position is not None)
        position = stored[0].position
        assert position is not None
        self._hint(self._intents.appended(EpochKey(position.epoch, position.nonce), entries))
        return stored

    def _hint(self, hint: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(hint)
        self._hints.add(task)
        task.add_done_callback(self._hints.discard)

    async def stop(self) -> None:
        """Let what is under way end."""
        if self._hints:
            await asyncio.wait(self._hints)

    async def receipts(self, stored: Sequence[Stored]) -> list[Receipt]:
        """What is known now of where the entries are stored."""
        return await self._receipts.now(stored)

    async def find(self, entry_id: str) -> Stored | None:
        """What is stored under an id, in the log or by this region's keeper; raises :class:`KeeperUnavailable`."""
        stored = self._index.get(entry_id)
        if stored is not None:
            return stored
        entry = await self._intents.find(entry_id)
        return None if entry is None else Stored(entry, None)

    def newest(self, kind: str | None, before_position: tuple[int, int] | None, limit: int) -> list[Stored]:
        """A page of the log, the newest first."""
        page: list[Stored] = []
        for stored in self._index.newest(lambda entry: kind in (None, entry.kind)):
            assert stored.position is not None
            if before_position is None or stored.position[:2] < before_position:
                page.append(stored)
                if len(page) == limit:
                    break
        return page


def _twice() -> RequestRefused:
    return RequestRefused("id_conflict", "the id is used twice in one request", status=409)


def _conflict() -> RequestRefused:
    return RequestRefused("id_conflict", "the id belongs to another revocation", status=409)
