"""When and how the trust log is cut shorter. Pure.

The log is an append-only stream whose readers notice every hole, so it is only ever cut at its head, and only where the
first entry that stays follows ``trimmed_to``. An entry is *dead* once ``expires_at + drop_grace_s`` is past, both by
the server's clock and by the caller's, so that neither clock alone shortens a revocation; an ``epoch`` entry is dead as
soon as something after it stays, because ``trimmed_to`` and the chain then say what it said. Everything else *lives*:
a ``kid``, a long token, and what this release cannot read. What lives at the head is *carried forward*: appended again
at the tail, as it is, in the same script that cuts it off.

    :class:`Survey`     is cutting worth it, and how far?
    :func:`plan`        the next piece of at most 1,000 entries: up to where, and what is carried forward
    :func:`kept_links`  which epochs the chain must still name

**Worth it** means: a prefix in which the dead are at least as many as the living, and at least ``TRIM_DEAD_MIN``; and
what follows it, again and again, as long as the dead in it are as many as the living. So

* memory: while no prefix is worth it, the log is shorter than twice its living entries plus ``TRIM_DEAD_MIN``;
* work: every copy is paid for by a dead entry that goes away. Copying adds nothing to the log's length, so no more dead
  entries ever go away than were appended, and no more copies are ever made than entries were appended (an epoch counts
  as ``EPOCH_WEIGHT``). A log of living entries is never copied in circles, whatever its length;
* reading: a survey that was in vain says when the next one is due (:class:`Quiet`): when so many will have died, or the
  log has grown by a quarter. Until then only its first piece is looked at.

**Gaps.** Where the log has a hole, cutting over it would hide from new readers that an entry is missing. A plan stops
before it, unless the caller knows it as answered: an epoch that opened after the hole was found, in which the keepers
have appended again what they hold.

**Readers.** A reader at or past the cut sees nothing of it. One before it finds a hole, reads again from the first
entry and unites; as the copies stand at the tail, it has everything that lives only once it has read to the end, and
must neither count a beat nor report a position before that.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from keyservice.limits import APPEND_ENTRIES_MAX
from verifier.log import EPOCH_KIND, Entry, Epoch, EpochLink, FormatError, parse_stream_id
from verifier.reader import Gap, Raw

from .evidence import EpochKey, key_of

__all__ = [
    "EPOCH_WEIGHT",
    "TRIM_DEAD_MIN",
    "TRIM_ENTRIES_MAX",
    "Cut",
    "Quiet",
    "Survey",
    "death_line",
    "kept_links",
    "plan",
]

TRIM_ENTRIES_MAX: Final = APPEND_ENTRIES_MAX
"""Entries that one script looks at, all of which it may have to append again."""

TRIM_DEAD_MIN: Final = 1_000
"""About 100 kB: less is not worth a script."""

EPOCH_WEIGHT: Final = 16
"""Dead entries that an epoch counts for: every reader reads its link in the chain several times a second."""

GROWTH: Final = 1.25
"""A log that was surveyed in vain is surveyed again when it has grown by this."""

END_STEP_S: Final = 60
"""Ends are counted by the minute: a day's tokens are 1,440 counters however many they are."""

_END: Final = re.compile(rb"[1-9][0-9]{0,15}\Z")

StreamId = tuple[int, int]

_NOTHING: Final = (0, -1)
"""The predecessor that an epoch names when it was opened on an empty log."""


def death_line(server_s: float, now: float, drop_grace_s: float) -> int:
    """The ``expires_at`` (Unix seconds) up to which entries are dead, by the clock that is behind."""
    return int(min(server_s, now) - drop_grace_s)


def _end_of(fields: Mapping[bytes, bytes]) -> int | None:
    """``expires_at``, 0 for an ``epoch`` entry, None for what has no end. ``trim.lua`` judges by the same rule."""
    if fields.get(b"kind") == EPOCH_KIND.encode():
        return 0
    end = fields.get(b"expires_at", b"")
    return int(end) if _END.match(end) else None


@dataclass(frozen=True, slots=True)
class Quiet:
    """A survey was in vain: the log as a whole stays not worth it while the line is before ``until_s``.

    Before that, or before it is ``length`` entries long, only its first piece is looked at: a shorter prefix may be
    worth it earlier, but the log's length is bounded without it.
    """

    until_s: float
    length: int

    def over(self, line_s: int, length: int) -> bool:
        """Whether to look again: ``line_s`` is the present :func:`death_line`."""
        return line_s >= self.until_s or length >= self.length


class Survey:
    """Counts the dead and the living from the log's first entry on.

    The last entry that was added is not counted: the log's last one always stays.
    """

    def __init__(self, line_s: int, dead_min: int = TRIM_DEAD_MIN) -> None:
        self._line_s = line_s
        self._dead_min = dead_min
        self._gain = 0
        self._live = 0
        self._ends: Counter[int] = Counter()
        self._counted = 0
        self._pending: Mapping[bytes, bytes] | None = None
        self.length = 0
        """The length of the prefix that is worth cutting, 0 if none is."""

    def add(self, entries: Iterable[Raw]) -> None:
        """The next entries."""
        for _, fields in entries:
            if self._pending is not None:
                self._count(_end_of(self._pending))
            self._pending = fields

    def _count(self, end: int | None) -> None:
        self._counted += 1
        if end is None or end > self._line_s:
            self._live += 1
            if end is not None:
                self._ends[-(-end // END_STEP_S) * END_STEP_S] += 1
            return
        self._gain += 1 if end else EPOCH_WEIGHT
        if self._gain >= max(self._live, 0 if self.length else self._dead_min):
            self.length = self._counted
            self._gain = self._live = 0  # what follows has to be worth it by itself

    def quiet(self) -> Quiet:
        """For a survey of the whole log that was in vain."""
        gain, live, until_s = self._gain, self._live, float("inf")
        for end in sorted(self._ends):
            gain, live = gain + self._ends[end], live - self._ends[end]
            if gain >= max(live, self._dead_min):
                until_s = end
                break
        return Quiet(until_s, int(self._counted * GROWTH) + self._dead_min)


class Cut(NamedTuple):
    """Cut off ``length`` entries from ``first`` to ``last``; ``survivor`` is then the first.

    ``carried`` are places in that prefix (from 0), to be appended again in this order.
    """

    first: StreamId
    last: StreamId
    survivor: StreamId
    trimmed_to: StreamId
    length: int
    carried: tuple[int, ...]


def plan(
    head: Sequence[Raw],
    *,
    epoch: Epoch,
    trimmed_to: StreamId | None,
    line_s: int,
    most: int = TRIM_ENTRIES_MAX,
    answered: Collection[Gap] = (),
) -> Cut | None:
    """The longest cut of at most ``most`` entries of the log's ``head``, or None if nothing can be cut off.

    The head's last entry is not cut off. ``answered`` are holes that an epoch which has opened since has filled.
    """
    most = min(most, TRIM_ENTRIES_MAX, len(head) - 1, _before_gap(head, trimmed_to, answered))
    ids = [parse_stream_id(stream_id) for stream_id, _ in head[: most + 1]]
    for count in range(most, 0, -1):
        following = _named_predecessor(head[count], epoch, ids[count - 1])
        if following is not None and ids[count - 1] <= following < ids[count]:
            return Cut(ids[0], ids[count - 1], ids[count], following, count, _carried(head[:count], line_s))
    return None


def _before_gap(head: Sequence[Raw], trimmed_to: StreamId | None, answered: Collection[Gap]) -> int:
    """How many entries stand before the entry at the first open gap; both of its sides stay, so that it stays known."""
    before: StreamId | None = None
    for place, raw in enumerate(head):
        try:
            here = parse_stream_id(raw[0])
        except FormatError:
            return max(place - 1, 0)
        follows = _follows(raw, here, trimmed_to if before is None else before, first=before is None)
        if not follows and (before, here) not in answered:
            return max(place - 1, 0)
        before = here
    return len(head)


def _follows(raw: Raw, here: StreamId, before: StreamId | None, *, first: bool) -> bool:
    """As :mod:`verifier.reader` has it."""
    if before is not None and here == (before[0], before[1] + 1):
        return True
    previous = _previous(raw, here)
    return first if previous == _NOTHING else previous is not None and previous == before


def _previous(raw: Raw, here: StreamId) -> StreamId | None:
    """What entry 0 of an epoch names as its predecessor; None if this is no such entry."""
    if here[1] != 0 or raw[1].get(b"kind") != EPOCH_KIND.encode():
        return None
    try:
        _, previous = Entry.decode(raw[1]).epoch_start()
    except FormatError:
        return None
    return _NOTHING if previous is None else previous[:2]


def _named_predecessor(raw: Raw, epoch: Epoch, last: StreamId) -> StreamId | None:
    """What ``trimmed_to`` must be for readers to begin with this entry, or None if they could not."""
    here = parse_stream_id(raw[0])
    if here[1] != 0:
        return (here[0], here[1] - 1) if epoch.nonce_of(here[0]) is not None else None
    previous = _previous(raw, here)
    return last if previous == _NOTHING else previous


def _carried(prefix: Sequence[Raw], line_s: int) -> tuple[int, ...]:
    """What lives there; of copies of one entry, the first."""
    seen: set[frozenset[tuple[bytes, bytes]]] = set()
    carried = []
    for place, (_, fields) in enumerate(prefix):
        end = _end_of(fields)
        content = frozenset((name, value) for name, value in fields.items() if name != b"at")
        if (end is None or end > line_s) and content not in seen:
            seen.add(content)
            carried.append(place)
    return tuple(carried)


def kept_links(links: Iterable[EpochLink], epoch: Epoch, trimmed_to: StreamId | None) -> list[EpochLink]:
    """Those of ``links`` (the chain, what is known beside it, or a keeper's disk) that are still needed, in order.

    All are, unless the epoch is open. Then a link may go that is older than all of these:

    * the epoch that ``trimmed_to`` lies in, whose nonce a reader's first position may need;
    * the newest epoch known to have opened before this one: an epoch opens with majorities of the voter sets since the
      newest one known to have opened, and for this and every later epoch that is this link or a newer one;
    * the one before this in the chain, from which a keeper counts the epochs that a laggard log lacks.

    A link that gave a keeper up for good stays while a link that stays has a seat for that keeper. A keeper may forget
    links by this rule only once it has merged into the epoch: then it merges into no older one, and for newer ones the
    link above is among those that it names. It does not add links again that are not needed.
    """
    every = list(links)
    floor = _floor(epoch, trimmed_to)
    if floor is None:
        return every
    recent = [link for link in every if _is_recent(link, floor)]
    seated = {keeper for link in (*recent, *epoch.chain[-1:]) for keeper in link.voters.values()}
    return [link for link in every if _is_recent(link, floor) or seated & set(link.forgotten)]


def _is_recent(link: EpochLink, floor: EpochKey) -> bool:
    return key_of(link) >= floor


def _floor(epoch: Epoch, trimmed_to: StreamId | None) -> EpochKey | None:
    present = key_of(epoch)
    opened = [key_of(link) for link in (*epoch.known, *epoch.chain) if link.opened and key_of(link) < present]
    before = [key_of(link) for link in epoch.chain if key_of(link) < present]
    if not epoch.open or trimmed_to is None or not opened or not before:
        return None
    return min(EpochKey(trimmed_to[0], ""), max(opened), max(before))
