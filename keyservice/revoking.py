"""Writing revocations: check, append, enforce here at once, and answer with receipts.

An id that is already in the log is not appended again: the same request gets the stored entry, another one a conflict.
Two requests with one id at the same time are one after the other. What is known of ids is in memory, from the mirror
and from own appends.

The times in an entry are this machine's: while its clock is known to be off, nothing is appended.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from verifier.log import Entry

from .core.ids import uuid7
from .core.revocation import (
    Draft,
    EntryIndex,
    RevocationPolicy,
    RevocationRequest,
    Stored,
    draft,
    entry_for,
    receipt,
)
from .errors import KeyserviceError, RequestRefused, StoreError
from .limits import APPEND_ENTRIES_MAX
from .trust import TrustLog

__all__ = ["Outcome", "Revoker"]

Outcome = Stored | KeyserviceError
"""What became of one revocation: where it stands in the log, or why it does not."""


class Revoker:
    """Appends revocations. ``enforce(entries)`` puts appended ones in force in this process.

    ``check_clock()`` raises :class:`ClockSkewed` while the clock is off.
    """

    def __init__(
        self,
        trust: TrustLog,
        index: EntryIndex,
        policy: RevocationPolicy,
        *,
        regions: Sequence[str],
        clock: Callable[[], float],
        check_clock: Callable[[], None],
        enforce: Callable[[list[Entry]], None],
        count: Callable[[str, int], None],
    ) -> None:
        self._trust = trust
        self._index = index
        self._policy = policy
        self._regions = regions
        self._clock = clock
        self._check_clock = check_clock
        self._enforce = enforce
        self._count = count
        self._under_way: dict[str, asyncio.Event] = {}

    def draft(self, request: RevocationRequest) -> Draft:
        """Check one request; raises :class:`RequestRefused`, :class:`ClockSkewed`."""
        self._check_clock()
        now = self._clock()
        return draft(request, uuid7(now), now, self._policy)

    async def revoke(self, wanted: Draft) -> Stored:
        """One revocation; raises :class:`StoreError`, :class:`RequestRefused`, :class:`ClockSkewed`."""
        (outcome,) = await self.revoke_all([wanted])
        if isinstance(outcome, KeyserviceError):
            raise outcome
        return outcome

    async def revoke_all(self, drafts: Sequence[Draft]) -> list[Outcome]:
        """Many revocations, each with its own outcome, in the order given.

        Ids are claimed in their order, so that two requests never wait for each other. Raises :class:`ClockSkewed`.
        """
        outcomes: dict[int, Outcome] = {}
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
            outcomes.update(await self._append(claimed))
        finally:
            for wanted in claimed.values():
                self._under_way.pop(wanted.id).set()
        return [outcomes[place] for place in range(len(drafts))]

    async def _known(self, wanted: Draft) -> Outcome | None:
        """The outcome of an id that was seen before; None after claiming an id that was not."""
        while wanted.id in self._under_way:
            await self._under_way[wanted.id].wait()
        stored = self._index.get(wanted.id)
        if stored is None:
            self._under_way[wanted.id] = asyncio.Event()
            return None
        if wanted.same_request(stored.entry):
            return stored
        return RequestRefused("id_conflict", "the id belongs to another revocation", status=409)

    async def _append(self, claimed: dict[int, Draft]) -> dict[int, Outcome]:
        outcomes: dict[int, Outcome] = {}
        entries: dict[int, Entry] = {}
        self._check_clock()
        now = self._clock()
        for place, wanted in claimed.items():
            try:
                entries[place] = entry_for(wanted, now, self._policy)
            except RequestRefused as refused:
                outcomes[place] = refused
        places = list(entries)
        for start in range(0, len(places), APPEND_ENTRIES_MAX):
            chunk = places[start : start + APPEND_ENTRIES_MAX]
            outcomes.update(zip(chunk, await self._append_chunk([entries[place] for place in chunk]), strict=True))
        return outcomes

    async def _append_chunk(self, entries: list[Entry]) -> Sequence[Outcome]:
        try:
            stored = await self._trust.append(entries)
        except StoreError as error:
            self._count(error.code, len(entries))
            return [error] * len(entries)
        self._count("appended", len(entries))
        self._index.add((place, entry) for entry, place in stored)
        self._enforce([entry for entry, _ in stored])
        return stored

    def receipt(self, stored: Stored) -> dict[str, Any]:
        """What is known now of where the entry is stored."""
        return receipt(stored, self._regions)

    def find(self, entry_id: str) -> Stored | None:
        """The entry under an id, or None."""
        return self._index.get(entry_id)

    def newest(self, kind: str | None, before_position: tuple[int, int] | None, limit: int) -> list[Stored]:
        """A page of the log, the newest first."""
        page: list[Stored] = []
        for stored in self._index.newest(lambda entry: kind in (None, entry.kind)):
            if before_position is None or stored.position[:2] < before_position:
                page.append(stored)
                if len(page) == limit:
                    break
        return page


def _twice() -> RequestRefused:
    return RequestRefused("id_conflict", "the id is used twice in one request", status=409)
