"""A Redis server as the trust log sees it: its keys, its replication id, and the scripts that write them.

A script is atomic. Every write makes a new immutable `Data`; a replica follows by taking over one of its primary's
versions, in order, and any of them may be what is left after a promotion or a restart.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any, NamedTuple

import msgspec

from keyservice.core.evidence import EpochKey, Protocol, Report, Voters, key_of, opened, renewed
from verifier.log import Beat, Entry, Epoch, EpochLink, Generation, Hole, Meta, Position

__all__ = ["EMPTY", "Data", "NewEpoch", "Refused", "Server", "StoredEntry"]


class StoredEntry(Entry, frozen=True, dict=True, gc=True):
    """An entry that computes its digest once."""

    @cached_property
    def _digest(self) -> bytes:
        return Entry.digest(self)

    def digest(self) -> bytes:
        return self._digest


@dataclass(frozen=True, slots=True)
class NewEpoch:
    """What whoever begins an epoch decides of it."""

    voters: Voters
    above: int = 0
    forgotten: tuple[str, ...] = ()
    holes: frozenset[Hole] = frozenset()
    chosen: EpochKey | None = None


class Refused(Exception):
    """A script refused before it wrote anything."""


class Data(NamedTuple):
    """All keys of `{trust}:` at one moment. `top` is the last id that the stream gave, also to an entry now deleted."""

    meta: Meta | None = None
    epoch: Epoch | None = None
    log: tuple[tuple[Position, Entry], ...] = ()
    top: tuple[int, int] = (0, 0)
    beat: Beat | None = None
    reports: Mapping[str, Report] = MappingProxyType({})


EMPTY = Data()


def named(epoch: Epoch, links: Iterable[EpochLink]) -> Epoch:
    """The epoch after a keeper has named the epochs that it knows."""
    chain = {key_of(link): link for link in epoch.chain}
    known = {key_of(link): link for link in epoch.known}
    for link in links:
        target = chain if key_of(link) in chain else known
        held = target.get(key_of(link))
        if held is None or (link.opened and not held.opened):
            target[key_of(link)] = link if held is None else msgspec.structs.replace(held, opened=True)
    return replace(epoch, chain=tuple(chain.values()), known=tuple(known.values()))


class Server:
    """One region's server. `upstream` is the primary it follows, None for a primary."""

    def __init__(self, region: str, protocol: Protocol, replid: int) -> None:
        self.region = region
        self.protocol = protocol
        self.replid = replid
        self.alive = True
        self.upstream: Server | None = None
        self.clock_offset_ms = 0
        self.history: list[Data] = [EMPTY]
        self.followed: tuple[int, int] | None = None
        self.deleted: set[str] = set()
        self.looked_at: tuple[object, int] = (None, 0)

    @property
    def data(self) -> Data:
        """The keys as they are now."""
        return self.history[-1]

    def _write(self, **changes: Any) -> None:
        self.history.append(self.data._replace(**changes))

    # -- replication ----------------------------------------------------------------------------------------------

    def follow(self, version: int) -> None:
        """Take over the primary's version with this number; a full synchronisation where its history is another."""
        primary = self.upstream
        assert primary is not None
        same = self.followed is not None and self.followed[0] == primary.replid
        at = max(version, self.followed[1]) if same and self.followed is not None else version
        self.followed = (primary.replid, at)
        if self.data is not primary.history[at]:
            self.history.append(primary.history[at])

    def become_primary(self, replid: int) -> None:
        """Promotion: go on with what it has, under a new replication id."""
        self.upstream, self.followed, self.replid = None, None, replid
        self.history = [*self.history[-8:]]

    def restart(self, replid: int, version: int) -> None:
        """Come back with a version of its own past, under a new replication id."""
        self.replid, self.followed, self.alive = replid, None, True
        self.history = [*self.history[: version + 1]]

    def wipe(self, replid: int) -> None:
        """Come back with nothing."""
        self.replid, self.followed, self.alive, self.history = replid, None, True, [EMPTY]

    def flush(self) -> None:
        """An operator deletes everything; the server goes on under its replication id."""
        self.history.append(EMPTY)

    def delete(self, position: Position) -> None:
        """An operator deletes an entry of the log."""
        self.deleted.update(entry.value for held, entry in self.data.log if held == position)
        self._write(log=tuple(item for item in self.data.log if item[0] != position))

    # -- scripts --------------------------------------------------------------------------------------------------

    def checked(self, seen: EpochKey) -> Epoch:
        """The checks in front of every script; raises `Refused`."""
        if self.upstream is not None:
            raise Refused("TRUST_NOT_PRIMARY")
        epoch = self.data.epoch
        if epoch is None:
            raise Refused("TRUST_NO_EPOCH")
        if not self.same_server(epoch):
            raise Refused("TRUST_REPLID")
        if key_of(epoch) != seen:
            raise Refused("TRUST_EPOCH")
        return epoch

    def same_server(self, epoch: Epoch) -> bool:
        """Whether the epoch was opened on this very history."""
        return epoch.replid == str(self.replid)

    def append(self, seen: EpochKey, entries: Iterable[Entry], links: Iterable[EpochLink] = ()) -> int:
        """Append entries and name epochs; the newest beat's number, -1 for none in this epoch."""
        epoch = self.checked(seen)
        first = self.data.top[1] + 1
        new = [(Position(epoch.number, first + i, epoch.nonce), entry) for i, entry in enumerate(entries)]
        top = new[-1][0][:2] if new else self.data.top
        self._write(log=(*self.data.log, *new), top=top, epoch=named(epoch, links))
        beat = self.data.beat
        return beat.n if beat is not None and beat.nonce == epoch.nonce else -1

    def put_report(self, report: Report) -> None:
        """Put a keeper's evidence in place."""
        self.checked(report.epoch)
        newer = renewed(self.data.reports.get(report.region), report)
        self._write(reports={**self.data.reports, report.region: newer})

    def issue_beat(self, seen: EpochKey, now_ms: int) -> None:
        """Say how far the log goes, and which beat a majority has confirmed."""
        epoch = self.checked(seen)
        self._write(beat=self._next_beat(epoch, now_ms))

    def _next_beat(self, epoch: Epoch, now_ms: int) -> Beat:
        held = self.data.beat if self.data.beat is not None and self.data.beat.nonce == epoch.nonce else None
        beat = Beat(
            nonce=epoch.nonce,
            n=(self._newest_reported(epoch) if held is None else held.n) + 1,
            at_ms=now_ms + self.clock_offset_ms,
            position=Position(*self.data.log[-1][0][:2], epoch.nonce),
            generation=Generation(epoch.number, 0),
        )
        confirmed = self.protocol.confirmed(epoch, self.data.reports.values())
        if confirmed is None:
            return beat
        number, seq = map(int, confirmed.beat_position.split("-"))
        return replace(
            beat,
            confirmed_n=confirmed.beat_n,
            confirmed_at_ms=confirmed.beat_at_ms,
            confirmed_position=Position(number, seq, epoch.nonce),
        )

    def _newest_reported(self, epoch: Epoch) -> int:
        """The highest number of a beat of this epoch that a region has reported: numbers never move back."""
        seats = self.protocol.voters(epoch)
        reports = (r for name, r in self.data.reports.items() if name in seats and r.nonce == epoch.nonce)
        return max((report.beat_n for report in reports), default=-1)

    def open_epoch(self, seen: EpochKey, now_ms: int) -> None:
        """Open the epoch, and issue a beat anew: only beats of an open epoch count. An open one stays as it is."""
        epoch = opened(self.checked(seen))
        if self.data.epoch is not None and self.data.epoch.open:
            return
        self._write(epoch=epoch)
        self._write(beat=self._next_beat(epoch, now_ms))

    def bump(self, seen: EpochKey | None, nonce: str, new: NewEpoch, *, now_ms: int, region: str) -> EpochKey | None:
        """A new epoch by compare-and-set; None if the epoch is another one than was seen."""
        if self.upstream is not None:
            raise Refused("TRUST_NOT_PRIMARY")
        held = self.data.epoch
        if (None if held is None else key_of(held)) != seen:
            return None
        last = self.data.log[-1][0] if self.data.log else None
        numbers = [new.above + 1, now_ms + self.clock_offset_ms, 0 if held is None else held.number + 1]
        number = max(*numbers, 0 if last is None else last.epoch + 1)
        previous = None if last is None else str(last)
        link = EpochLink(number, nonce, previous, dict(new.voters), False, new.forgotten, new.chosen)
        chain = (*(held.chain if held is not None else ()), link)
        known = held.known if held is not None else ()
        holes = new.holes or (held.holes if held is not None else new.holes)
        start = StoredEntry(f"epoch-{nonce}", "epoch", "", f"{nonce} {last or '-'}", None, 0, "", now_ms, region)
        self._write(
            meta=self.data.meta or Meta(nonce, None, 1, 1, 86_400),
            epoch=Epoch(number, nonce, str(self.replid), False, Generation(number, 0), chain, known, holes),
            log=(*self.data.log, (Position(number, 0, nonce), start)),
            top=(number, 0),
        )
        return key_of(link)
