"""Those who follow the log in a region: the verifier's mirror and the keeper, over a server of the model."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from keyservice.core.evidence import LogHead
from keyservice.core.keepers import Keeper, Step
from regions.model.server import Data
from verifier.freshness import Freshness
from verifier.log import Entry, FormatError, Hole, Position
from verifier.reader import Reader, Reread
from verifier.revocations import Mirror

__all__ = ["ISSUER", "MAX_SKEW_S", "Died", "KeeperTail", "SimVerifier", "Tail"]

ISSUER = "https://id.model.test"
MAX_SKEW_S = 5.0


class Died(Exception):
    """The keeper died while it stored what it read."""


@lru_cache(maxsize=4096)
def _raw(position: Position, entry: Entry) -> tuple[bytes, dict[bytes, bytes]]:
    """An entry as the stream shows it."""
    return position.stream_id.encode(), {k.encode(): v.encode() for k, v in entry.encode().items()}


class Tail:
    """Somebody who follows the log without a gap, as `verifier.mirroring` does."""

    reader_type = Reader

    def __init__(self) -> None:
        self.reader: Reader | None = None
        self.known: frozenset[Hole] = frozenset()
        self.held: Position | None = None

    def give_up(self, reason: str = "") -> None:
        """The log will be read from its first entry; what was read stays held."""
        if self.reader is not None:
            self.held = self.reader.held_after()
            self.known = self.reader.known_after() if reason == "next_epoch" else self.reader.known
            self.reader = None

    def round(self, entries_from: Data, data: Data, now_ms: int) -> None:
        """One round of reading: the entries first, and then what stands beside them, which may be newer.

        Whatever contradicts what was read makes it read again, and it keeps what it has.
        """
        if data.meta is None or data.epoch is None or not data.log:
            self.give_up()
            self.absent()
            return
        tolerant = False
        for _ in range(4):
            try:
                self._round(entries_from, data, now_ms, tolerant)
                break
            except Reread as reread:
                self.give_up(reread.reason)
                entries_from = data
                tolerant = reread.reason in ("hole", "fork")
            except FormatError:
                self.give_up()

    def _round(self, entries_from: Data, data: Data, now_ms: int, tolerant: bool) -> None:
        assert data.meta is not None
        assert data.epoch is not None
        reader = self.reader
        if reader is None:
            self.begin()
            whole = entries_from.meta is not None and entries_from.epoch is not None
            first = entries_from if whole else data
            reader = self.reader_type(
                first.meta or data.meta, first.epoch or data.epoch, tolerant, self.known, self.held
            )
        since = reader.position
        unread = entries_from.log
        if since is not None:
            unread = tuple(item for item in unread if item[0][:2] > since[:2])
        self.reader = None  # if this breaks off, entries that were accepted are lost
        accepted = reader.accept(_raw(position, entry) for position, entry in unread)
        stored = {position[:2]: entry for position, entry in unread}  # the very objects, which know their digests
        self.entries([(position, stored[position[:2]]) for position, _ in accepted])
        reader.tolerant = False
        reader.whole = True
        if reader.position is None:
            return
        self.reader = reader
        last_id = data.log[-1][0][:2]
        reader.check(data.meta, data.epoch, last_id, len(data.log))
        self.beside(data, reader, reader.position[:2] == last_id, now_ms)

    def absent(self) -> None:
        """The server holds no log."""

    def begin(self) -> None:
        """The log is read from its first entry."""

    def entries(self, accepted: list[tuple[Position, Entry]]) -> None:
        """New entries."""
        raise AssertionError("a tail does something with what it reads")

    def beside(self, data: Data, reader: Reader, at_end: bool, now_ms: int) -> None:
        """What stood beside the log after the entries were read."""
        raise AssertionError("a tail does something with what it reads")


class SimVerifier(Tail):
    """A verifier's mirror."""

    freshness_type = Freshness

    def __init__(self, wall_offset_ms: int) -> None:
        super().__init__()
        self.wall_offset_ms = wall_offset_ms
        self.mirror = Mirror()
        self.enforced = 0
        """How many of the acknowledged entries, from the first on, it is known to enforce."""
        self.freshness = self.freshness_type(MAX_SKEW_S)

    def entries(self, accepted: list[tuple[Position, Entry]]) -> None:
        """Enforce them."""
        self.mirror.apply(entry for _, entry in accepted)

    def beside(self, data: Data, reader: Reader, at_end: bool, now_ms: int) -> None:
        """Hear the beat."""
        assert data.meta is not None
        assert data.epoch is not None
        assert reader.position is not None
        state = replace(self.freshness, synced=True, holed_nonce=reader.holed_nonce)
        if data.beat is not None:
            now = (now_ms + self.wall_offset_ms) / 1000
            state = state.heard(data.beat, data.epoch, data.meta, now=now, mono=now_ms / 1000)
        self.freshness = state.reached(reader.position)

    def is_fresh(self, now_ms: int, bound_s: float) -> bool:
        """Whether it calls itself fresh."""
        now = (now_ms + self.wall_offset_ms) / 1000
        return self.freshness.staleness(now=now, mono=now_ms / 1000, max_staleness_s=bound_s).fresh

    def enforces(self, entry: Entry) -> bool:
        """Whether a token that the entry revokes is refused."""
        return self.mirror.snapshot.find(issuer=ISSUER, jti=entry.value) is not None


class KeeperTail(Tail):
    """A keeper's way to the log: what it reads goes to the keeper, and where it stands is kept for the next step."""

    def __init__(self, keeper: Keeper) -> None:
        super().__init__()
        self.keeper = keeper
        self.head: LogHead | None = None
        self.is_absent = False
        self.dies_after: int | None = None

    def round(self, entries_from: Data, data: Data, now_ms: int) -> None:
        """One round; `head` is None where it came to no end. Raises `Died` after `dies_after` entries, if any."""
        self.head, self.is_absent = None, False
        super().round(entries_from, data, now_ms)

    def next_step(self, now_ms: int) -> Step | None:
        """What the keeper wants to do after the round."""
        if self.head is None and not self.is_absent:
            return None
        return self.keeper.next_step(self.head, now_ms / 1000)

    def absent(self) -> None:
        """The server holds no log."""
        self.is_absent = True

    def begin(self) -> None:
        """Nothing on the keeper's disk was seen in this log yet."""
        self.keeper.begin()

    def entries(self, accepted: list[tuple[Position, Entry]]) -> None:
        """Everything that is read is stored."""
        if self.dies_after is not None:
            self.keeper.read(accepted[: self.dies_after])
            raise Died
        self.keeper.read(accepted)

    def beside(self, data: Data, reader: Reader, at_end: bool, now_ms: int) -> None:
        """What stood beside the log is stored after it."""
        assert data.epoch is not None
        assert reader.position is not None
        gaps = frozenset(reader.gaps)
        holed = not gaps <= data.epoch.holes
        self.head = LogHead(data.epoch, data.beat, reader.position, holed, None, gaps, at_end)
        self.keeper.read((), self.head.links)
