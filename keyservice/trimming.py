"""Cutting the trust log shorter, by one keeper at a time: whoever wins the compare-and-set in ``trim.lua``.

What to cut off is decided in :mod:`keyservice.core.trimming`; the script verifies it again by the server's own clock.
A run surveys the log, cuts in pieces of at most 1,000 entries, and then lets the chain of epochs forget what nobody
needs. A refusal or a lost reply costs nothing: the next run begins with what the log then is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple

import msgspec
import structlog
from redis.exceptions import RedisError

from verifier.log import EPOCH_KEY, LOG_KEY, META_KEY, Epoch, EpochLink, FormatError, Meta
from verifier.reader import Gap, Raw

from .core.trimming import TRIM_DEAD_MIN, TRIM_ENTRIES_MAX, Cut, Quiet, Survey, death_line, kept_links, plan
from .errors import PrimaryUnreachable, Refused
from .store import Node

__all__ = ["Trimmed", "Trimmer"]

_log: Final = structlog.get_logger(__name__)

CUTS_MAX: Final = 100
"""Scripts in one run, each of a few milliseconds of the primary's time; the next run goes on."""


@dataclass(frozen=True, slots=True)
class Trimmed:
    """What one run did. ``outcome`` is stable, and labels a counter:

    ``trimmed``, ``more`` (there is more to cut off), ``quiet`` (nothing is worth it), ``gap`` (a hole that no epoch has
    answered is in the way), ``lost`` (somebody else was faster), ``closed`` (the epoch is not open) or ``no_log``.

    ``removed`` entries are gone, of which ``carried`` were appended again; ``links`` epochs are no longer named.
    """

    outcome: str
    removed: int = 0
    carried: int = 0
    links: int = 0


class _Head(NamedTuple):
    """The log's head and what stands beside it, read in one step. ``server_s`` is the server's clock."""

    server_s: float
    length: int
    epoch: Epoch
    meta: Meta
    chain: str
    known: str
    raw: list[Raw]


class Trimmer:
    """Trims the log of one primary.

    ``answered()`` gives the holes that were found before the present epoch began, which answers them by opening;
    ``clock`` is this machine's (Unix seconds); ``drop_grace_s`` the seconds that an entry outlives its ``expires_at``;
    fewer than ``dead_min`` dead entries are left where they are.
    """

    def __init__(
        self,
        primary: Node,
        *,
        drop_grace_s: int,
        answered: Callable[[], Collection[Gap]] = frozenset,
        clock: Callable[[], float] = time.time,
        dead_min: int = TRIM_DEAD_MIN,
    ) -> None:
        self._primary = primary
        self._drop_grace_s = drop_grace_s
        self._answered = answered
        self._clock = clock
        self._dead_min = dead_min
        self._quiet: Quiet | None = None

    async def once(self) -> Trimmed:
        """One run. Raises :class:`StoreError`: the server refused by name, or cannot be reached."""
        head = await self._read_head()
        if head is None:
            return Trimmed("no_log")
        if not head.epoch.open:
            return Trimmed("closed")
        length = await self._survey(head)
        if not length:
            return Trimmed("quiet")
        done = await self._cut(length)
        if done.removed:
            done = replace(done, links=await self._prune())
            _log.info("log trimmed", outcome=done.outcome, removed=done.removed, carried=done.carried, links=done.links)
        if done.outcome == "gap":
            _log.error("log not trimmed: a hole that no epoch has answered is in the way")
        return done

    async def _survey(self, head: _Head) -> int:
        """The length of a prefix that is worth cutting off, or 0."""
        line_s = self._line_s(head)
        survey = Survey(line_s, self._dead_min)
        batch, worth = head.raw, -1
        survey.add(batch)
        if not survey.length and self._quiet is not None and not self._quiet.over(line_s, head.length):
            return 0
        while batch and (not survey.length or survey.length > worth):  # read on while that finds more
            worth = survey.length
            batch = await self._read_on(batch[-1][0])
            survey.add(batch)
        self._quiet = None if survey.length else survey.quiet()
        return survey.length

    async def _cut(self, length: int) -> Trimmed:
        """Cut off that many entries, in pieces."""
        done = Trimmed("trimmed")
        for _ in range(CUTS_MAX):
            head = await self._read_head()
            if head is None:
                return replace(done, outcome="lost")
            cut = self._plan(head, length - done.removed)
            if cut is None:
                return replace(done, outcome="gap")
            if not await self._run(head, cut):
                return replace(done, outcome="lost")
            done = replace(done, removed=done.removed + cut.length, carried=done.carried + len(cut.carried))
            if done.removed >= length:
                return done
        return replace(done, outcome="more")

    def _plan(self, head: _Head, most: int) -> Cut | None:
        return plan(
            head.raw,
            epoch=head.epoch,
            trimmed_to=head.meta.trimmed_to,
            line_s=self._line_s(head),
            most=most,
            answered=self._answered(),
        )

    def _line_s(self, head: _Head) -> int:
        return death_line(head.server_s, self._clock(), self._drop_grace_s)

    async def _run(self, head: _Head, cut: Cut) -> bool:
        """Carry a cut out; False if the log's head is another one by now."""
        ids = [_text(place) for place in (head.meta.trimmed_to, cut.trimmed_to, cut.first, cut.last, cut.survivor)]
        args: list[str | int] = [str(head.epoch.number), head.epoch.nonce, *ids, cut.length]
        args += [int(self._clock()), self._drop_grace_s, *(place + 1 for place in cut.carried)]
        try:
            await self._primary.run("trim.lua", (LOG_KEY, EPOCH_KEY, META_KEY), args)
        except Refused as refused:
            if refused.code in ("TRUST_TRIMMED", "TRUST_EPOCH", "TRUST_CLOSED"):
                return False
            raise _primary_gone(refused) from None
        return True

    async def _prune(self) -> int:
        """Let the chain forget what nobody needs any more; the number of epochs that it forgot."""
        head = await self._read_head()
        if head is None:
            return 0
        chain, dropped = _kept(head.chain, head.epoch.chain, head)
        known, dropped_beside = _kept(head.known, head.epoch.known, head)
        if not dropped and not dropped_beside:
            return 0
        args: list[str | int] = [str(head.epoch.number), head.epoch.nonce, head.chain, chain, head.known, known]
        try:
            await self._primary.run("prune.lua", (EPOCH_KEY,), args)
        except Refused as refused:
            if refused.code in ("TRUST_REV", "TRUST_EPOCH", "TRUST_CLOSED"):
                return 0
            raise _primary_gone(refused) from None
        return dropped + dropped_beside

    # -- reading ----------------------------------------------------------------------------------------------------

    async def _read_head(self) -> _Head | None:
        try:
            async with self._primary.redis.pipeline(transaction=True) as pipe:
                pipe.time()
                pipe.xlen(LOG_KEY)
                pipe.hgetall(EPOCH_KEY)
                pipe.hgetall(META_KEY)
                pipe.xrange(LOG_KEY, count=TRIM_ENTRIES_MAX + 1)
                (seconds, _), length, epoch, meta, raw = await pipe.execute()
        except (RedisError, OSError):
            raise PrimaryUnreachable from None
        if not epoch or not meta or not raw:
            return None
        try:
            decoded = Epoch.decode(epoch), Meta.decode(meta)
        except FormatError as error:
            raise Refused(f"TRUST_FORMAT_{error.code}") from None
        return _Head(seconds, length, *decoded, _json(epoch, b"chain"), _json(epoch, b"known"), raw)

    async def _read_on(self, after: bytes) -> list[Raw]:
        try:
            reply: Any = await self._primary.redis.xrange(LOG_KEY, min=f"({after.decode()}", count=TRIM_ENTRIES_MAX)
        except (RedisError, OSError):
            raise PrimaryUnreachable from None
        batch: list[Raw] = reply
        return batch


def _text(place: tuple[int, int] | None) -> str:
    return "" if place is None else f"{place[0]}-{place[1]}"


def _json(fields: dict[bytes, bytes], name: bytes) -> str:
    return fields.get(name, b"[]").decode()


def _kept(text: str, links: tuple[EpochLink, ...], head: _Head) -> tuple[str, int]:
    """The list as it shall be, each link as it was written, and how many went."""
    kept = kept_links(links, head.epoch, head.meta.trimmed_to)
    written = msgspec.json.decode(text, type=list[msgspec.Raw])
    stay = [raw for raw, link in zip(written, links, strict=True) if link in kept]
    return msgspec.json.encode(stay).decode(), len(links) - len(stay)


def _primary_gone(refused: Refused) -> Refused | PrimaryUnreachable:
    """A script that may run out of memory's way is refused by a replica before its own checks."""
    if refused.code in ("READONLY", "TRUST_NOT_PRIMARY"):
        return PrimaryUnreachable("the server at KEYSERVICE_PRIMARY_URL is not a primary", code="not_primary")
    return refused
