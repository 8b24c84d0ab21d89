"""Following the log without a gap: what a batch means, and when to start over. Pure.

A reader holds a position and accepts only its successor. It never forgets entries: whatever is wrong, the answer is to
keep everything held, read the log again from its first entry, and take the union.

    state        input                                        next
    ---------    -----------------------------------------    -------------------------------------------
    no position  the entry after ``meta.trimmed_to``, or      position there (:meth:`Reader.accept`)
                 entry 0 of an epoch that names that, or
                 nothing, as its predecessor
    no position  anything else                                :class:`Reread` (``hole`` or ``fork``)
    at P         entry P + 1, or entry 0 of an epoch that      position there
                 names P as its predecessor
    at P         anything else                                :class:`Reread` (``hole`` or ``fork``)
    at P         a round's meta, epoch, last id and length    :class:`Reread` if they contradict P: another
                                                              incarnation, a rewind, a trim, a deletion, or an epoch
                                                              whose history forked off before P
    re-reading   a gap that is in the log itself              taken over it; the epoch's beats do not count

A gap in the log itself stains the epoch in which it is met: somewhere in it may be an entry that was acknowledged, so
no beat of this epoch can vouch that everything before it is held. Three gaps do not stain, because what was in them is
held here, or stands in the log a second time before any beat that counts:

* one before a position that this mirror had reached without a stain, in the same history (``held``): it has everything
  from there, and drops nothing but what has expired. So a deletion behind readers, which they notice by the log's
  length, costs them a second read and no freshness.
* one that was met while the log was in an earlier epoch than it is in now (``known``).
* one that the current epoch names (``Epoch.holes``).

The last two rest on the keeper rules (:mod:`keyservice.core.keepers`). The gap was in the log before the epoch N was
opened: this mirror saw the gap and after it an epoch before N, and a replica shows the primary's writes in their order;
or N's opener saw it, and opening is a write on the primary. A keeper merges into N by comparing what it has on disk
with the log from its first entry *as N shows it*, so with the gap in it, and adds what is lacking. Whoever held an
acknowledged entry from the gap did so before N opened; and a beat counts only if it was issued after that, and once its
position is applied.

It is not enough that a gap lies in an epoch older than the newest open one. An entry that is deleted after the merge
was seen by every keeper and added by none, and a mirror that starts then would call itself fresh without it. The log's
positions do not tell the two cases apart; the opener of an epoch can, hence ``Epoch.holes``. A stain is also gone once
the log is trimmed past the gap. All this is about gaps in the primary's log: replicas are read-only.

``open_gaps`` are those that no epoch has answered, whether they stain this mirror or not: a keeper answers them with a
new epoch, for the sake of mirrors that start later.

A log is trimmed at its head, and what lives there is appended again at the tail in the same step; never over a gap
that no epoch has answered. So a pass over a trimmed log holds everything that lives only once it was read to its end
(``whole``): until then neither its position nor a beat counts. A trim between two batches shows as a hole; the meta
that stood beside the batch (:meth:`Reader.beside`) tells the two apart, so that no trim is ever taken for a loss.

An entry that cannot be parsed takes its place in the sequence and is counted, so that one poison entry stops nobody.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from .entries import Fields, read_entry, read_usual
from .log import EPOCH_KIND, Entry, Epoch, FormatError, Hole, Meta, Position, parse_stream_id

__all__ = ["Gap", "Listed", "Raw", "Reader", "Reread"]

_tuple: Final = tuple.__new__
"""Makes a position in half the time that its own class takes."""

UNKNOWN_NONCE: Final = "0" * 16
"""Stands for the nonce of an epoch that is not in the chain; no epoch has it."""


class Reread(Exception):
    """The log must be read again from its first entry. ``reason`` is stable: it labels a counter."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


Raw = tuple[bytes, Mapping[bytes, bytes]]
Listed = tuple[bytes, Fields]
"""A stream id and the entry's fields, by name (:data:`Raw`) or as the server lists them."""

_Id = tuple[int, int]
Gap = tuple[_Id | None, _Id]
"""The stream ids on both sides of a gap, None for the beginning of the log: a hole without its history."""


@dataclass(slots=True)
class Reader:
    """One pass over the log. ``tolerant`` is set while re-reading a log that is known to have a hole.

    ``known`` are gaps that were met in earlier epochs, ``held`` the last position up to which everything is held.
    ``gaps`` are all those that this pass was taken over, ``stains`` those of them that make ``holed_nonce``'s beats
    count for nothing. ``whole``: it was read to the end once, and holds everything that lives up to its position.
    """

    meta: Meta
    epoch: Epoch
    tolerant: bool = False
    known: frozenset[Hole] = frozenset()
    held: Position | None = None
    gaps: set[Hole] = field(default_factory=set)
    stains: set[Hole] = field(default_factory=set)
    open_gaps: set[Hole] = field(default_factory=set)
    position: Position | None = None
    holed_nonce: str | None = None
    witnessed: bool = False
    skipped: list[str] = field(default_factory=list)
    whole: bool = False
    _runs: list[tuple[int, int, int]] = field(default_factory=list)

    def beside(self, meta: Meta) -> None:
        """The meta that stood beside the next batch, or later; raises :class:`Reread` if that was trimmed past me."""
        if meta.incarnation != self.meta.incarnation:
            raise Reread("incarnation")
        if self.position is not None and _trimmed_past(meta, self.position):
            raise Reread("trimmed")
        self.meta = meta

    def accept(self, batch: Iterable[Listed]) -> list[tuple[Position, Entry]]:
        """The batch's entries with their positions; raises :class:`Reread` and keeps the position before the gap."""
        accepted: list[tuple[Position, Entry]] = []
        for stream_id, fields in batch:
            last = self.position
            entry = read_usual(fields) or self._decode(fields)
            if last is not None and stream_id == b"%d-%d" % (last[0], last[1] + 1):  # as nearly always
                position = _tuple(Position, (last[0], last[1] + 1, last[2]))
                run_number, first, _ = self._runs[-1]
                self._runs[-1] = (run_number, first, last[1] + 1)
            else:
                position = self._place(stream_id, entry)
                self._count(position)
            self.position = position
            if entry is not None:
                accepted.append((position, entry))
        return accepted

    def _place(self, stream_id: bytes, entry: Entry | None) -> Position:
        """Where the entry stands, if that follows; raises :class:`Reread`."""
        try:
            number, seq = parse_stream_id(stream_id)
        except FormatError:
            raise Reread("stream_id") from None  # what was accepted before it in this batch must not be lost
        return Position(number, seq, self._nonce_at(number, seq, entry))

    def _decode(self, fields: Fields) -> Entry | None:
        try:
            return read_entry(fields)
        except FormatError as error:
            self.skipped.append(error.code)
            return None

    def _count(self, position: Position) -> None:
        """Remember runs of entries without a gap: epoch, first and last seq."""
        number, seq, _ = position
        if self._runs:
            run_number, first, last = self._runs[-1]
            if run_number == number and last + 1 == seq:
                self._runs[-1] = (number, first, seq)
                return
        self._runs.append((number, seq, seq))

    def _nonce_at(self, number: int, seq: int, entry: Entry | None) -> str:
        """The nonce of the entry at this place, if the place follows; raises :class:`Reread`."""
        last = self.position
        if last is None:
            return self._first(number, seq, entry)
        if number == last.epoch:
            return last.nonce if seq == last.seq + 1 else self._gap("hole", number, seq)
        if seq != 0 or number < last.epoch or entry is None or entry.kind != EPOCH_KIND:
            return self._gap("hole", number, seq)
        nonce, previous = entry.epoch_start()
        if previous != last:
            self._gap("fork", number, seq)
        return nonce

    def _first(self, number: int, seq: int, entry: Entry | None) -> str:
        """The log begins where it was trimmed to, or with an epoch that was opened on an empty log."""
        trimmed_to = self.meta.trimmed_to
        if trimmed_to is not None and (number, seq) <= trimmed_to:
            return self._gap("hole", number, seq)
        if seq == 0 and entry is not None and entry.kind == EPOCH_KIND:
            nonce, previous = entry.epoch_start()
            return nonce if previous is None or previous[:2] == trimmed_to else self._gap("hole", number, seq)
        if trimmed_to is None or (number, seq) != (trimmed_to[0], trimmed_to[1] + 1):
            return self._gap("hole", number, seq)
        nonce_held = self.epoch.nonce_of(number)
        return nonce_held if nonce_held is not None else self._gap("fork", number, seq)

    def _gap(self, reason: str, number: int, seq: int) -> str:
        nonce = self.epoch.nonce_of(number) or UNKNOWN_NONCE
        gap = (self.position, Position(number, seq, nonce))
        answered = gap in self.known or gap in self.epoch.holes
        if not answered and not self._holds(gap):
            if not self.tolerant:
                raise Reread(reason)
            self.holed_nonce = self.epoch.nonce
            self.stains.add(gap)
        if not answered:
            self.open_gaps.add(gap)
        self.gaps.add(gap)
        return nonce

    def _holds(self, gap: Hole) -> bool:
        """Whether this mirror read what is missing, in this very history: an epoch's nonce stands for all before it."""
        held = self.held
        return held is not None and gap[1][:2] <= held[:2] and self.epoch.nonce_of(held.epoch) == held.nonce

    def check(self, meta: Meta, epoch: Epoch, last_id: _Id | None, length: int | None = None) -> None:
        """Compare a later round's meta, epoch, last stream id and length with what was read; raises :class:`Reread`."""
        if meta.incarnation != self.meta.incarnation:
            raise Reread("incarnation")
        last = self.position
        if last is None or last_id is None or last_id < last[:2]:
            raise Reread("rewind")
        if _trimmed_past(meta, last):
            raise Reread("trimmed")
        if self.holed_nonce is None:
            _check_history(epoch, last)
        # More than was read is as bad: a deletion that an older state undid hides the next one.
        if length is not None and last_id == last[:2] and length != self._left_after(meta.trimmed_to):
            raise Reread("deleted")
        if self.holed_nonce is not None:
            self._check_stains(meta, epoch)
        if not epoch.holes - self.epoch.holes <= self.gaps:  # found by others, and here only what was in them is held
            raise Reread("answered")
        if epoch.nonce != self.epoch.nonce and self.witnessed:  # begun after the gaps were met
            self.known, self.open_gaps = self.known | self.gaps, set()
        self.open_gaps -= epoch.holes
        self.witnessed = True
        self.meta, self.epoch = meta, epoch

    def _check_stains(self, meta: Meta, epoch: Epoch) -> None:
        """Read again where that takes the stain away: in the next epoch, or where the gap was trimmed or named."""
        if epoch.nonce != self.holed_nonce:
            raise Reread("next_epoch")
        trimmed_to = meta.trimmed_to
        if trimmed_to is not None and self.stains and all(trimmed_to >= _before(right) for _, right in self.stains):
            raise Reread("trimmed")
        if self.stains and self.stains <= epoch.holes:
            raise Reread("answered")

    def _left_after(self, trimmed_to: _Id | None) -> int:
        """How many of the entries that were read are still in the log, if nothing was taken out but by trimming."""
        left = 0
        for number, first, last in self._runs:
            if trimmed_to is None or number > trimmed_to[0]:
                left += last - first + 1
            elif number == trimmed_to[0]:
                left += max(0, last - max(first - 1, trimmed_to[1]))
        return left

    def known_after(self) -> frozenset[Hole]:
        """Gaps that need not stain the next epoch: those of this pass, if an epoch before it was seen after them."""
        return self.known | self.gaps if self.witnessed else self.known

    def held_after(self) -> Position | None:
        """The last position up to which everything is held, when this reader is given up."""
        return self.position if self.holed_nonce is None else self.held


def _before(position: Position) -> _Id:
    """The last stream id that is missing before this one, or more."""
    return (position.epoch, position.seq - 1) if position.seq else position[:2]


def _check_history(epoch: Epoch, position: Position) -> None:
    """Raises :class:`Reread` if the position is not part of this epoch's history."""
    if epoch.nonce_of(position.epoch) != position.nonce:
        raise Reread("nonce")
    if _forked_before(epoch, position):
        raise Reread("fork")


def _forked_before(epoch: Epoch, position: Position) -> bool:
    """Whether this history left the position's epoch before it came to the position.

    A blocked read is not woken when the server takes over another history, and answers that there is nothing new: only
    the chain then says that what was read beyond the fork is not in this log.
    """
    later = [link for link in epoch.chain if link.number > position.epoch]
    if not later or later[0].previous is None:
        return bool(later)
    return Position.parse(later[0].previous)[:2] < position[:2]


def _trimmed_past(meta: Meta, position: Position) -> bool:
    return meta.trimmed_to is not None and meta.trimmed_to > position[:2]
