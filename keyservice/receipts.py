"""What is known of where a revocation is stored: evidence of the region's own server, asked for while somebody waits.

An entry counts as *replicated* by rule 1 of :mod:`keyservice.core.keepers`, at its place in the epoch's history. Where
it stands in that history is known from the append itself, if that was in the same epoch, else from the mirror.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from verifier.log import Epoch, Position, parse_stream_id

from .core.evidence import Protocol, key_of
from .core.revocation import EntryIndex, Stored
from .errors import StoreError
from .evidence import Evidence, read_evidence
from .limits import RECEIPT_POLL_S
from .store import Node

__all__ = ["Receipt", "Receipts"]


class Receipt(NamedTuple):
    """``position`` is None for what is stored by the region's keeper and in no log yet."""

    stored: Stored
    replicated: bool
    regions: dict[str, bool]

    @property
    def position(self) -> Position | None:
        """Where the entry stands in the log."""
        return self.stored.position

    def document(self) -> dict[str, Any]:
        """What the caller gets."""
        return {
            "id": self.stored.entry.id,
            "position": None if self.position is None else str(self.position),
            "durability": "replicated" if self.replicated else "pending",
            "regions": self.regions,
        }


class Receipts:
    """``regions`` are those of the settings; ``epoch()`` is the epoch that the mirror, and so ``index``, is in."""

    def __init__(
        self, own: Node, index: EntryIndex, regions: Sequence[str], *, epoch: Callable[[], Epoch | None]
    ) -> None:
        self._own = own
        self._index = index
        self._regions = tuple(regions)
        self._epoch = epoch
        self._protocol = Protocol()
        self._evidence: Evidence | None = None
        self._news = asyncio.Event()
        self._waiting = 0
        self._poll: asyncio.Task[None] | None = None

    async def settle(self, stored: Sequence[Stored], timeout_s: float) -> list[Receipt]:
        """Wait until all of these are replicated, at most so long; their receipts as they then are."""
        deadline = time.monotonic() + timeout_s
        self._waiting += 1
        if self._poll is None or self._poll.done():
            self._poll = asyncio.get_running_loop().create_task(self._ask())
        try:
            while True:
                await self._next_evidence(deadline)
                if self._all_replicated(stored) or time.monotonic() >= deadline:
                    return self._receipts(stored)
        finally:
            self._waiting -= 1

    async def now(self, stored: Sequence[Stored]) -> list[Receipt]:
        """Their receipts as evidence stands now."""
        await self._refresh()
        return self._receipts(stored)

    async def stop(self) -> None:
        """End asking."""
        if self._poll is not None:
            self._poll.cancel()
            await asyncio.wait([self._poll])

    # -- asking -----------------------------------------------------------------------------------------------------

    async def _ask(self) -> None:
        while self._waiting:
            started = time.monotonic()
            await self._refresh()
            await asyncio.sleep(max(0.0, started + RECEIPT_POLL_S - time.monotonic()))

    async def _refresh(self) -> None:
        try:
            evidence = await read_evidence(self._own, self.regions())
        except StoreError:
            return  # what was known ages; a receipt then says pending, which is true
        self._evidence = evidence
        news, self._news = self._news, asyncio.Event()
        news.set()

    def regions(self) -> tuple[str, ...]:
        """Every region that may have a keeper: those of the settings, and those with a seat."""
        epoch = self._evidence.epoch if self._evidence is not None else None
        return tuple(dict.fromkeys((*self._regions, *(self._protocol.voters(epoch) if epoch is not None else ()))))

    async def _next_evidence(self, deadline: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                await self._news.wait()

    # -- deciding ---------------------------------------------------------------------------------------------------

    def _place(self, stored: Stored, epoch: Epoch) -> Position | None:
        """Where the entry stands in this epoch's history, or None if that is not known."""
        if stored.position is not None and stored.position.nonce == epoch.nonce:
            return stored.position
        mirrored = self._epoch()
        if mirrored is None or key_of(mirrored) != key_of(epoch):
            return None
        return self._index.place_of(stored.entry)

    def _all_replicated(self, stored: Sequence[Stored]) -> bool:
        """Asked with all new evidence, of up to 10,000 at a time: done with at the first that is not."""
        evidence = self._evidence
        if evidence is None or evidence.epoch is None:
            return False
        epoch = evidence.epoch
        replicated_to = self._protocol.replicated_to(epoch, evidence.reports.values())
        if replicated_to is None:
            return False
        places = (self._place(one, epoch) for one in reversed(stored))
        return all(place is not None and replicated_to >= place[:2] for place in places)

    def _receipts(self, stored: Sequence[Stored]) -> list[Receipt]:
        evidence = self._evidence
        nowhere = dict.fromkeys(self._regions, False)
        if evidence is None or evidence.epoch is None:
            return [Receipt(one, False, nowhere) for one in stored]
        epoch, reports = evidence.epoch, evidence.reports.values()
        held = {r.keeper_id: parse_stream_id(r.held) for r in reports if self._protocol.counts(r, epoch)}
        seats = {region: held.get(keeper_id, (-1, -1)) for region, keeper_id in self._protocol.voters(epoch).items()}
        replicated_to = self._protocol.replicated_to(epoch, reports) or (-1, -1)
        receipts = []
        for one in stored:
            place = self._place(one, epoch)
            if place is None:
                receipts.append(Receipt(one, False, nowhere))
            else:
                regions = nowhere | {region: upto >= place[:2] for region, upto in seats.items()}
                receipts.append(Receipt(Stored(one.entry, place), replicated_to >= place[:2], regions))
        return receipts
