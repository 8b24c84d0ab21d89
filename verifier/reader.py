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
    at P         a round's meta, epoch and last id            :class:`Reread` if they contradict P: another
                                                              incarnation, a rewind, a trim, or an epoch whose history
                                                              forked off before P
    re-reading   a gap that is in the log itself              taken over it; the epoch's beats do not count
    re-reading   a gap that an earlier epoch had recorded     taken over it: the regions have answered with this epoch

A log is trimmed at its head, and what lives there is appended again at the tail in the same step. So a pass over a
trimmed log holds everything that lives only once it was read to its end (``whole``): until then neither its position
nor a beat counts. A trim between two batches shows as a hole; the meta that stood beside the batch
(:meth:`Reader.beside`) tells the two apart, so that no trim is ever taken for a loss.

An entry that cannot be parsed takes its place in the sequence and is counted, so that one poison entry stops nobody.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from .log import EPOCH_KIND, Entry, Epoch, FormatError, Meta, Position, parse_stream_id

__all__ = ["Reader", "Reread"]


class Reread(Exception):
    """The log must be read again from its first entry. ``reason`` is stable: it labels a counter."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


Raw = tuple[bytes, Mapping[bytes, bytes]]
Gap = tuple[tuple[int, int] | None, tuple[int, int]]
"""The stream ids on both sides of a gap, None for the beginning of the log."""


@dataclass(slots=True)
class Reader:
    """One pass over the log. ``tolerant`` is set while re-reading a log that is known to have a hole.

    ``known`` are gaps that were recorded in earlier epochs, ``gaps`` those that this pass was taken over. ``whole``:
    it was read to the end once, and holds everything that lives up to its position.
    """

    meta: Meta
    epoch: Epoch
    tolerant: bool = False
    known: frozenset[Gap] = frozenset()
    gaps: set[Gap] = field(default_factory=set)
    position: Position | None = None
    holed_nonce: str | None = None
    skipped: list[str] = field(default_factory=list)
    whole: bool = False

    def beside(self, meta: Meta) -> None:
        """The meta that stood beside the next batch, or later; raises :class:`Reread` if that was trimmed past me."""
        if meta.incarnation != self.meta.incarnation:
            raise Reread("incarnation")
        if self.position is not None and _trimmed_past(meta, self.position):
            raise Reread("trimmed")
        self.meta = meta

    def accept(self, batch: Iterable[Raw]) -> list[tuple[Position, Entry]]:
        """The batch's entries with their positions; raises :class:`Reread` and keeps the position before the gap."""
        accepted: list[tuple[Position, Entry]] = []
        for stream_id, fields in batch:
            try:
                number, seq = parse_stream_id(stream_id)
            except FormatError:
                raise Reread("stream_id") from None  # what was accepted before it in this batch must not be lost
            entry = self._decode(fields)
            position = Position(number, seq, self._nonce_at(number, seq, entry))
            self.position = position
            if entry is not None:
                accepted.append((position, entry))
        return accepted

    def _decode(self, fields: Mapping[bytes, bytes]) -> Entry | None:
        try:
            return Entry.decode(fields)
        except FormatError as error:
            self.skipped.append(error.code)
            return None

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
        gap = (None if self.position is None else self.position[:2], (number, seq))
        if gap not in self.known:
            if not self.tolerant:
                raise Reread(reason)
            self.holed_nonce = self.epoch.nonce
        self.gaps.add(gap)
        return self.epoch.nonce_of(number) or "0" * 16

    def check(self, meta: Meta, epoch: Epoch, last_id: tuple[int, int] | None) -> None:
        """Compare a later round's meta, epoch and last stream id with the position; raises :class:`Reread`."""
        if meta.incarnation != self.meta.incarnation:
            raise Reread("incarnation")
        last = self.position
        if last is None or last_id is None or last_id < last[:2]:
            raise Reread("rewind")
        if _trimmed_past(meta, last):
            raise Reread("trimmed")
        if epoch.nonce_of(last.epoch) != last.nonce and self.holed_nonce is None:
            raise Reread("nonce")
        if self.holed_nonce is not None and epoch.nonce != self.holed_nonce:
            raise Reread("next_epoch")
        if self.holed_nonce is None and _forked_before(epoch, last):
            raise Reread("fork")
        self.meta, self.epoch = meta, epoch


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
