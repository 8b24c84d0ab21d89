"""The keeper rules: what makes an acknowledged revocation survive, and a fresh verifier right. Pure.

Redis may lose acknowledged writes at any failover or restart, so truth is not what a server holds but the union of what
the keepers hold: one per region, storing durably every entry that its region's replica shows. Revocations are a set
that only grows, so a union needs no order and no leader. An *epoch*, (number, nonce), is one server's history from the
moment that a writer opened it by compare-and-set; histories that do not know of each other never share a nonce.

A keeper's life in one epoch, from what its own replica shows:

    the log is in …                        the keeper …
    -------------------------------------  --------------------------------------------------------------------------
    no epoch: there is no log              registers (``Register``) if it holds nothing; else as in the next line
    an epoch older than its promise        stores what is new; opens a new epoch above the promise (``Bump``)
    an epoch it has not merged into        appends what it holds and the log lacks (``Add``); when nothing is lacking,
                                           *promises* the epoch, on disk, and from then on reports it as merged
    the epoch it has merged into           stores, and reports how far it holds the log and which beat it has seen
    an epoch whose log has a hole          opens a new epoch that names it, which all merge into: nothing stays lost,
                                           and verifiers that start later know that it was answered

Before it merges it also makes sure of the voters: where it knows of some that were chosen later than this epoch's, a
log that lags behind has brought old voters back; it opens a new epoch with the newer ones. On a server that holds no
log at all it does the same, with the voters on its disk that were chosen last.

It merges only into an epoch whose history it has read: between two reads another history may have taken the place of
the one that it knows.

Rules, each of which a model shows to be needed (``regions model``):

1. An entry is *replicated* when the epoch is open and a majority of its voters, merged into it, hold the entry's
   position: counted within one nonce, never over epochs.
2. *Held p* means that everything from the log's first entry up to p is on disk, inherited entries included.
3. An epoch starts closed. It *opens* when majorities of its voters, and of every voter set that a merged keeper knows
   since the newest epoch known to have opened, have merged. Until then nothing is acknowledged or confirmed.
4. A beat counts for freshness once a later one says that a majority of the voters confirmed it, and only if it was
   issued in an open epoch: opening issues one anew, and nobody confirms in a closed epoch.
5. Merging is a promise: from then on the keeper reports nothing in an older epoch, by (number, nonce). It still stores
   what an older epoch shows, and adds it again.
6. A keeper confirms only beats that were issued after its own merge.

Why it holds: majorities of one voter set intersect. Take an entry acknowledged in epoch E and a later epoch N that
opened. Some keeper held the entry before it promised N, so it added it before N opened; and every beat that counts was
issued after that.

*Voters* are seats, one per region, each held by a keeper id; a vacant seat (an empty id) counts in the majority. A
failover keeps the voters. A keeper that lost its disk, or was restored from a copy, is another keeper: it takes a new
id, and is no voter until it is made one.

An *intent* is an entry that a writer is about to append: it is on disk before that, and left to the writer for a while.
No promise waits for it, because nobody can have acknowledged an entry that no log has shown.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from keyservice.limits import ADDED_GRACE_S, APPEND_ENTRIES_MAX
from verifier.log import EPOCH_KIND, Beat, Entry, EpochLink, Hole, Position

from .evidence import EpochKey, LogHead, Report, Voters, chosen_in, key_of
from .trimming import kept_links

__all__ = ["Add", "Bump", "Disk", "Keeper", "MemoryDisk", "Register", "Send", "Step"]


class Disk(Protocol):
    """What a keeper has stored: every method that changes it is one durable write, complete or not made at all.

    ``entries`` are known by digest: a union keeps two different entries under one id.
    """

    @property
    def keeper_id(self) -> str:
        """Whose disk this is."""

    @property
    def promise(self) -> EpochKey | None:
        """The epoch that was promised last."""

    @property
    def links(self) -> Mapping[EpochKey, EpochLink]:
        """Every epoch that it has heard of."""

    @property
    def commit(self) -> int:
        """How many writes there were."""

    def digests(self) -> Iterable[bytes]:
        """Of all entries, the oldest first."""

    def get(self, digests: Sequence[bytes]) -> Sequence[Entry]:
        """The entries with these digests, less those that were dropped meanwhile."""

    def store(self, entries: Iterable[Entry], links: Iterable[EpochLink]) -> None:
        """Keep what is new; an epoch once known to have opened stays so."""

    def drop_links(self, keys: Iterable[EpochKey]) -> None:
        """Forget epochs that nobody can ask for any more."""

    def make_promise(self, epoch: EpochKey) -> None:
        """Rule 5; a promise only moves forward."""


@dataclass(slots=True)
class MemoryDisk:
    """A :class:`Disk` for models and tests."""

    keeper_id: str
    promise: EpochKey | None = None
    entries: dict[bytes, Entry] = field(default_factory=dict)
    links: dict[EpochKey, EpochLink] = field(default_factory=dict)
    commit: int = 0

    def digests(self) -> Iterable[bytes]:
        return self.entries

    def get(self, digests: Sequence[bytes]) -> Sequence[Entry]:
        return [self.entries[digest] for digest in digests if digest in self.entries]

    def store(self, entries: Iterable[Entry], links: Iterable[EpochLink]) -> None:
        new = {digest: entry for entry in entries if self._is_news(digest := entry.digest(), entry)}
        changed = news_of(links, self.links)
        if new or changed:
            self.entries.update(new)
            self.links.update(changed)
            self.commit += 1

    def drop_links(self, keys: Iterable[EpochKey]) -> None:
        for key in list(keys):
            if self.links.pop(key, None) is not None:
                self.commit += 1

    def _is_news(self, digest: bytes, entry: Entry) -> bool:
        held = self.entries.get(digest)
        return held is None or (held.at == 0 and entry.at != 0)

    def make_promise(self, epoch: EpochKey) -> None:
        if self.promise is None or epoch > self.promise:
            self.promise = epoch
            self.commit += 1


def news_of(links: Iterable[EpochLink], held: Mapping[EpochKey, EpochLink]) -> dict[EpochKey, EpochLink]:
    """The links that are not held yet, or not yet as opened."""
    newer = {key_of(link): link for link in links if link.opened or key_of(link) not in held}
    return {key: link for key, link in newer.items() if held.get(key) != link}


@dataclass(frozen=True, slots=True)
class Register:
    """Say who will have this region's seat, on a server that has no log yet."""

    keeper_id: str


@dataclass(frozen=True, slots=True)
class Bump:
    """Open a new epoch above this number, after the one that was seen (None: on a server without a log).

    ``holes`` are those that were found in the log; the new epoch answers them. ``chosen`` is the epoch for which the
    voters were chosen, None for this very one.
    """

    above: int
    seen: EpochKey | None
    voters: Voters
    holes: frozenset[Hole] = frozenset()
    chosen: EpochKey | None = None


@dataclass(frozen=True, slots=True)
class Add:
    """Append these entries and name these epochs, in the epoch that was seen. ``complete``: nothing more is lacking.

    Epochs are named together with the last of the entries: who hears that an epoch has opened may rely on it that
    whatever was acknowledged before that is in the log.
    """

    seen: EpochKey
    entries: tuple[Entry, ...]
    links: tuple[EpochLink, ...]
    complete: bool = True


@dataclass(frozen=True, slots=True)
class Send:
    """Put this report in place, in the epoch that it names."""

    report: Report


Step = Register | Bump | Add | Send


class Keeper:
    """One keeper. Only ``disk`` survives a crash. Whoever runs it carries its steps out.

    The log is read in passes: :meth:`begin`, then :meth:`read` from the first entry on, then :meth:`next_step` whenever
    it was read to its end. After an ``Add`` was carried out on the primary: :meth:`added`. A step that fails is simply
    decided again.
    """

    def __init__(self, region: str, disk: Disk, *, add_entries_max: int = APPEND_ENTRIES_MAX) -> None:
        self.region = region
        self.disk = disk
        self._add_entries_max = add_entries_max
        self._missing: dict[bytes, None] = dict.fromkeys(disk.digests())
        self._pass: EpochKey | None = None
        self._merged: EpochKey | None = None
        self._merged_beat = -1
        self._added_in: EpochKey | None = None
        self._added: dict[bytes, float | None] = {}
        self._intents: dict[bytes, float] = {}
        self._strange: tuple[EpochLink, ...] = ()

    @property
    def merged(self) -> EpochKey | None:
        """The epoch that it is merged into, in this life of the process."""
        return self._merged

    @property
    def pending(self) -> int:
        """How many entries on disk the log does not show."""
        return len(self._missing)

    # -- reading --------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """The log will be read from its first entry: nothing on disk has been seen in it yet."""
        self._pass = None
        self._missing = dict.fromkeys(self.disk.digests())

    def read(self, items: Iterable[tuple[Position, Entry]], links: Iterable[EpochLink] = ()) -> None:
        """Store what the replica shows, whatever the epoch (rule 5); ``links`` are :attr:`LogHead.links`.

        Of a log that names no epoch which is on disk, the epochs wait until the primary has taken something in one of
        them: a replica that was led to another system's primary must not bring that one's voters here.
        """
        shown = [entry for _, entry in items if entry.kind != EPOCH_KIND]
        named = tuple(links)
        if named:
            self._strange = () if self._knows(named) else named
        self.disk.store(shown, named if self._strange == () else ())
        for entry in shown:
            digest = entry.digest()
            self._missing.pop(digest, None)
            self._added.pop(digest, None)
            self._intents.pop(digest, None)

    def _knows(self, named: Iterable[EpochLink]) -> bool:
        return not self.disk.links or any(key_of(link) in self.disk.links for link in named)

    # -- writers' intents -----------------------------------------------------------------------------------------

    def intend(self, entries: Sequence[Entry], until_mono: float) -> None:
        """Store what a writer is about to append; until then (monotonic seconds) the appending is left to it."""
        digests = [entry.digest() for entry in entries]
        held = self.disk.get(digests)
        self.disk.store(entries, ())
        for digest in set(digests) - {entry.digest() for entry in held}:
            self._missing[digest] = None
            self._intents[digest] = until_mono

    def appended(self, epoch: EpochKey, entries: Iterable[Entry]) -> None:
        """A writer appended these intents in this epoch: they need not be added once more."""
        if self._added_in == epoch:
            self._note_added(entries)

    def given_up(self, entries: Iterable[Entry]) -> None:
        """A writer could not append these intents: they are this keeper's now."""
        for entry in entries:
            self._intents.pop(entry.digest(), None)

    # -- deciding -------------------------------------------------------------------------------------------------

    def next_step(self, head: LogHead | None, mono: float) -> Step | None:
        """What to do about the log as far as it was read (None: there is no log at all)."""
        if head is None:
            return self.bump_above(None) if self.disk.links else Register(self.disk.keeper_id)
        seen, self._pass = key_of(head.epoch), None
        if self.is_outvoted(head) or self.has_newer_voters(head):
            return self.bump_above(seen)
        if head.holed or (head.at_end and not head.is_of_epoch):
            return self._bump(seen, head.epoch.chain[-1], head.gaps)
        if not head.is_of_epoch:
            return None
        self._pass = seen
        add = self.lacking(head, mono)
        if self._merged != seen or add.entries:
            return add
        self.forget_epochs(head)
        return Send(self.report(head))

    def lacking(self, head: LogHead, mono: float) -> Add:
        """What is on disk and the log lacks, but for what was added already and is on its way to the replica."""
        seen = key_of(head.epoch)
        digests = self._lacking(seen, mono)
        named = {key_of(link): link.opened for link in (*head.epoch.chain, *head.epoch.known)}
        needed = {key_of(link): link for link in kept_links(self.disk.links.values(), head.epoch, head.trimmed_to)}
        links = tuple(link for key, link in needed.items() if key not in named or link.opened > named[key])
        chunk = digests[: self._add_entries_max]
        entries = tuple(self.disk.get(chunk))
        if len(entries) != len(chunk):  # some have expired and were dropped
            for digest in set(chunk) - {entry.digest() for entry in entries}:
                del self._missing[digest]
        complete = len(chunk) == len(digests)
        return Add(seen, entries, links if complete else (), complete)

    def _lacking(self, seen: EpochKey, mono: float) -> list[bytes]:
        added = self._added if self._added_in == seen else {}
        for digest in added:
            added[digest] = added[digest] or mono + ADDED_GRACE_S
        waiting = {digest for digest, until_mono in added.items() if until_mono is not None and until_mono > mono}
        return [digest for digest in self._missing if digest not in waiting and self._intents.get(digest, 0.0) <= mono]

    def forget_epochs(self, head: LogHead) -> None:
        """Once merged: drop what the log need not be told of any more."""
        links = self.disk.links
        kept = {key_of(link) for link in kept_links(links.values(), head.epoch, head.trimmed_to)}
        if len(kept) < len(links):
            self.disk.drop_links([key for key in links if key not in kept])

    def is_outvoted(self, head: LogHead) -> bool:
        """Whether the log fell back behind the promise. Without a new epoch a minority's would stall everybody."""
        return self.disk.promise is not None and key_of(head.epoch) < self.disk.promise

    def has_newer_voters(self, head: LogHead) -> bool:
        """Whether voters are known that were chosen later: a laggard log has brought old ones back."""
        newest = max(map(chosen_in, self.disk.links.values()), default=None)
        return newest is not None and newest > chosen_in(head.epoch.chain[-1])

    def bump_above(self, seen: EpochKey | None) -> Bump:
        """A new epoch above everything known, with the voters that were chosen last."""
        return self._bump(seen, max(self.disk.links.values(), key=chosen_in))

    def _bump(self, seen: EpochKey | None, link: EpochLink, holes: frozenset[Hole] = frozenset()) -> Bump:
        known = (*self.disk.links, seen, self.disk.promise)
        numbers = [key.number for key in known if key is not None]
        return Bump(max(numbers), seen, link.voters, holes, chosen_in(link))

    def added(self, add: Add, beat_n: int, mono: float) -> None:
        """The primary has taken these entries; ``beat_n`` is the newest beat of its epoch, -1 for none.

        If nothing is lacking any more, this is the merge: the promise is on disk before anything is reported. What was
        read meanwhile in another epoch, or is being read anew, has to be compared with this one first.
        """
        if self.disk.promise is not None and add.seen < self.disk.promise:
            return
        if any(key_of(link) == add.seen for link in self._strange):
            self.disk.store((), self._strange)
            self._strange = ()
        if self._added_in != add.seen:
            self._added_in, self._added = add.seen, {}
        self._note_added(add.entries)
        if not add.complete or self._merged == add.seen:
            return
        if self._pass == add.seen and not self._lacking(add.seen, mono):
            self.disk.make_promise(add.seen)
            self._merged, self._merged_beat = add.seen, beat_n

    def _note_added(self, entries: Iterable[Entry]) -> None:
        """On their way to the replica, unless it has shown them meanwhile."""
        for digest in [entry.digest() for entry in entries]:
            if digest in self._missing:
                self._added[digest] = None  # how long it may take counts from the next decision

    # -- reporting ------------------------------------------------------------------------------------------------

    def report(self, head: LogHead) -> Report:
        """Evidence for the epoch that is merged into: everything that the log shows is stored (rules 2, 6)."""
        report = Report(
            region=self.region,
            keeper_id=self.disk.keeper_id,
            number=head.epoch.number,
            nonce=head.epoch.nonce,
            held=head.position.stream_id,
            commit=self.disk.commit,
        )
        beat = head.beat
        if beat is None or not self.confirms(beat, head):
            return report
        return msgspec.structs.replace(
            report, beat_n=beat.n, beat_at_ms=beat.at_ms, beat_position=beat.position.stream_id
        )

    def confirms(self, beat: Beat, head: LogHead) -> bool:
        """Rules 4 and 6, and only once everything up to the beat is on disk."""
        return (
            beat.nonce == head.epoch.nonce
            and head.epoch.open
            and beat.n > self._merged_beat
            and head.position[:2] >= beat.position[:2]
        )
