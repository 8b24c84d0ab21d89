"""Taking keys out of use for good, and saying for how long they were still good where.

One verb: the ``kid`` entries are stored like any revocation, the records are marked compromised in every key set, and
where a key of this region was active its standby signs. What is then measured, on this region's own server, is when
each region's keeper held the entry (its verifiers read the same server, so from about then on they refuse) and when the
region served the key no more. What is not known by the end of the wait is said to be unknown, never guessed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import structlog

from .core import rotation
from .core.revocation import RevocationRequest
from .core.rotation import KeyRecord, Serving
from .errors import KeyserviceError, RequestRefused, StoreError
from .evidence import read_evidence
from .limits import RECEIPT_POLL_S
from .receipts import Receipt
from .revoking import Outcome, Revoker
from .store import Node
from .trust import KeysView, TrustLog, read_serving

__all__ = ["Compromise", "Compromiser", "Exposure"]

T = TypeVar("T")

EXPOSURE_WAIT_S: Final = 5.0
"""How long an answer waits for the last region: the demo's slowest link needs a tenth of it."""

_log: Final = structlog.get_logger(__name__)


@dataclass(slots=True)
class Exposure:
    """How long after the request a region still accepted or served a key, in milliseconds; None while not known."""

    refused_after_ms: int | None = None
    unpublished_after_ms: int | None = None

    @property
    def known(self) -> bool:
        """Whether both were seen."""
        return self.refused_after_ms is not None and self.unpublished_after_ms is not None


@dataclass(frozen=True, slots=True)
class Compromise:
    """What was done to ``kids``. ``exposure`` is per region."""

    kids: tuple[str, ...]
    receipts: tuple[Receipt, ...]
    exposure: Mapping[str, Exposure]

    @property
    def complete(self) -> bool:
        """Whether every entry is replicated and every region was measured."""
        return all(receipt.replicated for receipt in self.receipts) and all(e.known for e in self.exposure.values())

    def document(self, *, partition_budget_s: float, jwks_max_age_s: int, client_cache_max_s: int) -> dict[str, Any]:
        """What the caller gets; the times are what bounds that which cannot be measured."""
        return {
            "kids": list(self.kids),
            "revocations": [receipt.document() for receipt in self.receipts],
            "exposure": {
                region: {
                    "refused_after_ms": seen.refused_after_ms,
                    "unpublished_after_ms": seen.unpublished_after_ms,
                    "unknown_at_most_s": None if seen.known else partition_budget_s,
                }
                for region, seen in self.exposure.items()
            },
            "third_party_clients": {
                "honouring_max_age_s": jwks_max_age_s,
                "caching_at_most_s": max(jwks_max_age_s, client_cache_max_s),
            },
        }


class Compromiser:
    """``tick()`` lets the rotator of this region act at once, ``refresh()`` has the new key set read soon."""

    def __init__(
        self,
        own: Node,
        trust: TrustLog,
        revoker: Revoker,
        *,
        region: str,
        regions: Callable[[], Sequence[str]],
        tick: Callable[[], Awaitable[KeysView]],
        refresh: Callable[[], None],
        clock: Callable[[], float],
    ) -> None:
        self._own, self._trust, self._revoker = own, trust, revoker
        self._region, self._regions = region, regions
        self._tick, self._refresh, self._clock = tick, refresh, clock

    async def compromise(self, records: Collection[KeyRecord], reason: str) -> Compromise:
        """Take these keys out of use. Raises what stored nothing at all: :class:`KeyserviceError`."""
        started = time.monotonic()
        requests = [RevocationRequest(kind="kid", value=record.kid, reason=reason) for record in records]
        outcomes = await self._revoker.revoke_all([self._revoker.draft(request) for request in requests])
        stored = _stored(outcomes)
        await self._mark(records)
        receipts, exposure = await self._watch([record.kid for record in records], stored, started)
        _log.warning("keys compromised", kids=[record.kid for record in records], region=self._region)
        return Compromise(tuple(record.kid for record in records), tuple(receipts), exposure)

    async def _mark(self, records: Collection[KeyRecord]) -> None:
        """Into every key set, also where the region that owns a key is gone; its own rotator may be faster."""
        view = await _tolerantly(self._tick())  # as the primary has them: what was read here may be a moment old
        newest = {} if view is None else view.records
        for record in (newest.get(record.kid, record) for record in records if record.region != self._region):
            if record.state != "compromised":
                moved = rotation.compromised(record, self._clock())
                await _tolerantly(self._trust.put_keys([(record.rev, moved)]))
        self._refresh()

    async def _watch(
        self, kids: Sequence[str], receipts: Sequence[Receipt], started: float
    ) -> tuple[Sequence[Receipt], dict[str, Exposure]]:
        """The receipts as they are at the end: after a failover, what an old place says of a region is no evidence."""
        seen = {region: Exposure() for region in self._regions()}
        while True:
            try:
                receipts = await self._revoker.receipts([receipt.stored for receipt in receipts])
                epoch = (await read_evidence(self._own, ())).epoch
                serving = Serving() if epoch is None else await read_serving(self._own, tuple(seen), epoch)
            except StoreError:
                pass
            else:
                elapsed_ms = round((time.monotonic() - started) * 1000)
                for region, exposure in seen.items():
                    _look(region, exposure, kids, receipts, serving, elapsed_ms)
            if all(exposure.known for exposure in seen.values()) or time.monotonic() > started + EXPOSURE_WAIT_S:
                return receipts, seen
            await asyncio.sleep(RECEIPT_POLL_S)


def _look(
    region: str,
    exposure: Exposure,
    kids: Sequence[str],
    receipts: Sequence[Receipt],
    serving: Serving,
    elapsed_ms: int,
) -> None:
    if exposure.refused_after_ms is None and all(receipt.regions.get(region) for receipt in receipts):
        exposure.refused_after_ms = elapsed_ms
    served = serving.since.get(region)
    if exposure.unpublished_after_ms is None and served is not None and served.keys().isdisjoint(kids):
        exposure.unpublished_after_ms = elapsed_ms


def _stored(outcomes: Sequence[Outcome]) -> list[Receipt]:
    """The receipts; raises the first error, if there is one: what is stored stays so, and the verb may be repeated."""
    for outcome in outcomes:
        if isinstance(outcome, KeyserviceError):
            raise outcome
    return [outcome for outcome in outcomes if isinstance(outcome, Receipt)]


async def _tolerantly(work: Awaitable[T]) -> T | None:
    """The revocation stands whatever becomes of this; the owning region's rotator sees to the rest."""
    try:
        return await work
    except (StoreError, RequestRefused) as error:
        _log.info("key record not marked now", code=error.code)
        return None
