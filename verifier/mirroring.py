"""What every mirror of the trust log has in common, whatever it reads from: applying, publishing, and its thread.

A *source* (:mod:`verifier.replica`) brings batches of stream entries and, now and then, the :class:`LogState` beside
them. This file turns them into a :class:`View`. Decisions are in :mod:`verifier.reader`, :mod:`verifier.freshness` and
:mod:`verifier.revocations`. The order of calls within one session with a server:

    _resume(state)                        the position held is in that server's log: go on from it
    _begin(state) _apply(batch)* _end()   or read the log from its first entry
    (_apply(batch)* _round(state))*       and then follow it

Any of them raises :class:`~verifier.reader.Reread` when the log contradicts what was read; after ``_reread(reason)`` it
is read from its first entry. Everything known stands in one immutable :class:`View`, replaced by a single
assignment. Losing the server changes nothing in it but its age.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Final

from .freshness import Freshness
from .limits import FIRST_READ_PAUSE_S, RECONNECT_DELAY_MAX_S, RECONNECT_DELAY_MIN_S
from .log import Beat, Entry, Epoch, FormatError, Hole, Meta, Position
from .reader import Gap, Listed, Reader
from .reconnecting import Breaker, Reconnecting
from .revocations import Mirror, Snapshot

__all__ = ["LogListener", "LogState", "MirrorThread", "NotReady", "Round", "View"]

_log: Final = logging.getLogger("verifier.mirror")

DROP_EVERY_S: Final = 30.0
"""How often expired entries are looked for; they are harmless meanwhile."""

DROP_BUCKETS: Final = 2_048
"""How much of what is held as fingerprints is looked at in one round: about 5 ms; what is left, in the next ones."""

DROP_BEAT_AGE_MAX_S: Final = 5.0
"""A mirror that is staler than this drops nothing: a clock alone must never bring a token back."""


@dataclass(frozen=True, slots=True)
class View:
    """What the mirror knows at one moment.

    ``connection`` is connecting, reading, tailing, waiting, circuit_open or closed. ``read_entries`` of ``read_total``
    (None: not told) entries of the log have been read in the latest read from its first entry.
    """

    snapshot: Snapshot
    freshness: Freshness
    position: Position | None = None
    epoch: Epoch | None = None
    connection: str = "connecting"
    problem: str | None = None
    read_entries: int = 0
    read_total: int | None = None


class NotReady(Exception):
    """The server answers but has no trust log (yet): empty, loading, or being synchronised."""


@dataclass(frozen=True, slots=True)
class LogState:
    """What a server holds beside the log's entries, read in one step.

    ``last_id`` is the log's last stream id, ``length`` how many entries it has (None: not told).
    """

    epoch: Epoch
    meta: Meta
    beat: Beat | None
    last_id: tuple[int, int]
    length: int | None = None


@dataclass(frozen=True, slots=True)
class Round:
    """A complete round: everything up to ``position`` was handed on before, and the rest was read after it.

    ``gaps`` are those in the log, ``open_gaps`` those of them that no epoch has answered. One that is not in
    ``epoch.holes`` keeps mirrors that start now from being fresh, until an epoch is opened that names it. ``at_end``:
    the log ended at ``position`` when the rest was read.
    """

    epoch: Epoch
    meta: Meta
    beat: Beat | None
    position: Position
    holed_nonce: str | None
    gaps: frozenset[Hole] = frozenset()
    open_gaps: frozenset[Hole] = frozenset()
    at_end: bool = True


class LogListener:
    """Hears what a mirror reads, in order, from the mirror's thread and outside its locks.

    An exception from here is a failure of the mirror, which then reads again from the log's first entry.
    """

    def begin(self) -> None:
        """A read from the log's first entry begins."""

    def entries(self, accepted: list[tuple[Position, Entry]]) -> None:
        """Entries that follow each other and what was handed on before; unreadable ones are left out."""

    def round(self, state: Round) -> None:
        """A round is complete and contradicts nothing."""

    def absent(self) -> None:
        """The server answers and holds no trust log: its meta, its epoch or every entry is missing."""


class MirrorThread(ABC):
    """A mirror with one daemon thread. A source gives :meth:`_session` and :meth:`_problem_of`.

    ``max_skew_s``, ``drop_grace_s`` and ``max_token_lifetime_s`` (the longest token that its verifier accepts) are the
    design's bounds in seconds; ``join_s`` how long closing waits for the thread, ``breaker`` an optional circuit
    breaker.
    """

    def __init__(
        self,
        *,
        max_skew_s: float,
        drop_grace_s: float,
        max_token_lifetime_s: float,
        nodes: int,
        name: str,
        join_s: float,
        breaker: Breaker | None = None,
    ) -> None:
        self._reader: Reader | None = None
        self._known_gaps: frozenset[Hole] = frozenset()
        self._held: Position | None = None
        self._tolerant = False
        self._drop_grace_s = drop_grace_s
        self._mirror = Mirror()
        self._mirror_lock = threading.Lock()
        self._on_change: list[Callable[[View], None]] = []
        self._listeners: list[LogListener] = []
        self._closing = threading.Event()
        self._advanced = threading.Condition()
        self._thread: threading.Thread | None = None
        self._nodes, self._name, self._join_s, self._breaker = nodes, name, join_s, breaker
        self._served = False
        self._next_drop_mono = 0.0
        self._view = View(self._mirror.snapshot, Freshness(max_skew_s, max_token_lifetime_s))
        self.counters: Counter[str] = Counter()

    # -- what others read -----------------------------------------------------------------------------------------

    @property
    def view(self) -> View:
        """Everything known, in one immutable object."""
        return self._view

    @property
    def snapshot(self) -> Snapshot:
        """The revocations known now."""
        return self._view.snapshot

    @property
    def answered_gaps(self) -> frozenset[Gap]:
        """Holes of the log that were found before the present epoch began: it answers them by opening."""
        reader, epoch = self._reader, self._view.epoch
        holes = (self._known_gaps if reader is None else reader.known) | (epoch.holes if epoch else frozenset())
        return frozenset((None if left is None else left[:2], right[:2]) for left, right in holes)

    def subscribe(self, on_change: Callable[[View], None]) -> None:
        """Call ``on_change(view)`` after each new view is in place, from the thread that made it."""
        self._on_change.append(on_change)

    def listen(self, listener: LogListener) -> None:
        """Let it hear everything that is read. To be called before :meth:`start`."""
        self._listeners.append(listener)

    def wait_synced(self, timeout_s: float) -> bool:
        """Wait for the first complete read of the log; False if it did not happen in time."""
        with self._advanced:
            return self._advanced.wait_for(lambda: self._view.freshness.synced, timeout_s)

    def wait_position(self, reached: Callable[[View], bool], timeout_s: float) -> bool:
        """Wait until ``reached(view)`` holds; False if it did not in time."""
        with self._advanced:
            return self._advanced.wait_for(lambda: reached(self._view), timeout_s)

    def apply_local(self, entries: Sequence[Entry]) -> None:
        """Enforce entries that this process has just appended, without waiting for them to come back."""
        with self._mirror_lock:
            changed = self._mirror.apply(entries)
            if changed:
                self._publish(snapshot=self._mirror.snapshot)

    # -- life -----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the thread; does nothing if it runs."""
        if self._closing.is_set() and self._thread is not None:
            self._thread.join()  # bounded by the socket's time-outs; two threads must never share a reader
        if self._thread is None or not self._thread.is_alive():
            self._closing.clear()
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Stop the thread and its connection; what was mirrored stays readable and goes on ageing."""
        self._closing.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(self._join_s)

    def abandon(self) -> None:
        """In a forked child: let go of what is the parent's, whose thread does not exist there."""
        self._thread = None

    @abstractmethod
    def _session(self, node: int) -> None:
        """Connect to this node and follow it until it is lost or the mirror is closed."""

    @abstractmethod
    def _problem_of(self, error: Exception) -> str | None:
        """A short, stable name of what ended a session, never the error's own text; None for a mistake of ours."""

    def _run(self) -> None:
        reconnecting = Reconnecting(self._nodes, self._breaker)
        while not self._closing.is_set():
            self._served = False
            self._update(connection="connecting")
            try:
                self._session(reconnecting.node)
            except Exception as error:  # noqa: BLE001 - a mistake of ours must not end the mirror in silence
                if not self._closing.is_set():  # or it was hung up on
                    self._lost(error)
            pause = reconnecting.after(served=self._served)
            if self._nodes > 1:
                self._give_up_reader()
            self._update(connection="circuit_open" if pause.circuit_open else "waiting")
            self._closing.wait(pause.delay_s)
        self._update(connection="closed")

    def _lost(self, error: Exception) -> None:
        problem = self._problem_of(error)
        if problem is None:
            _log.error("mirror failed; starting over", exc_info=error)
            self.counters["failures"] += 1
            self._give_up_reader()
            return
        self.counters["disconnects"] += 1
        if problem != self._view.problem:
            _log.warning("mirror lost its source: %s", problem)
        self._publish(problem=problem)

    # -- what a source calls, from the thread -----------------------------------------------------------------------

    def _beat_of(self, fields: Mapping[bytes, bytes]) -> Beat | None:
        """The beat, or None: without one the mirror ages, but goes on reading."""
        try:
            return Beat.decode(fields) if fields else None
        except FormatError as error:
            self.counters["beats_skipped"] += 1
            _log.error("mirror skipped a beat that it cannot read: %s", error.code)
            return None

    def _absent(self) -> NotReady:
        """The server holds no trust log: tells the listeners, and returns what to raise."""
        for listener in self._listeners:
            listener.absent()
        return NotReady("the server holds no trust log")

    def _resume(self, state: LogState) -> Reader | None:
        """The reader of the lost session, if the server still holds what it read; raises :class:`Reread`."""
        if self._reader is not None:
            self._reader.check(state.meta, state.epoch, state.last_id, state.length)
        return self._reader

    def _begin(self, state: LogState) -> Reader:
        """A read from the first entry begins. Its reader is kept only once the read is complete."""
        for listener in self._listeners:
            listener.begin()
        self._publish(read_entries=0, read_total=state.length)
        return Reader(state.meta, state.epoch, self._tolerant, self._known_gaps, self._held)

    def _give_up_reader(self) -> None:
        """The log will be read from its first entry; what was read stays held."""
        if self._reader is not None:
            self._held, self._known_gaps = self._reader.held_after(), self._reader.known
            self._reader = None

    def _end(self, reader: Reader) -> None:
        """The read from the first entry is complete."""
        if reader.position is None:
            raise NotReady("the trust log is empty")
        reader.tolerant = False  # the next gap is another one, and may heal
        reader.whole = True
        self._reader = reader
        with self._mirror_lock:
            reached, read = self._reached(reader, reader.position), self._view.read_entries
            self._publish(position=reader.position, freshness=reached, read_total=read)

    def _apply(self, reader: Reader, batch: Sequence[Listed]) -> None:
        """Entries, in the log's order; raises :class:`Reread`."""
        skipped = len(reader.skipped)
        accepted = reader.accept(batch)
        for code in reader.skipped[skipped:]:
            self.counters["entries_skipped"] += 1
            _log.error("mirror skipped an entry that it cannot read: %s", code)
        if not accepted:
            return
        self.counters["entries_read"] += len(accepted)
        with self._mirror_lock:
            self._mirror.apply(entry for _, entry in accepted)
            snapshot = self._mirror.snapshot
            if reader.whole:
                reached = self._reached(reader, *_ends(accepted))
                self._publish(snapshot=snapshot, position=reader.position, freshness=reached)
            else:  # what was carried forward is still to come: what is held grows, but no position vouches for it yet
                self._publish(snapshot=snapshot, read_entries=self._view.read_entries + len(batch))
        for listener in self._listeners:
            listener.entries(accepted)
        if not reader.whole:
            time.sleep(FIRST_READ_PAUSE_S)

    def _reached(self, reader: Reader, *positions: Position) -> Freshness:
        freshness = replace(self._view.freshness, holed_nonce=reader.holed_nonce)
        for position in positions:
            freshness = freshness.reached(position)
        return freshness

    def _round(self, reader: Reader, state: LogState) -> None:
        """What stood beside the log after the entries that were applied before; raises :class:`Reread`."""
        reader.check(state.meta, state.epoch, state.last_id, state.length)
        assert reader.position is not None  # or the check had refused
        freshness = replace(self._view.freshness, synced=True, holed_nonce=reader.holed_nonce)
        if state.beat is not None:
            freshness = freshness.heard(state.beat, state.epoch, state.meta, now=time.time(), mono=time.monotonic())
        freshness = freshness.reached(reader.position)
        self._served = True
        self._drop_expired(freshness)
        self._publish(freshness=freshness, epoch=state.epoch, connection="tailing", problem=None)
        gaps, open_gaps = frozenset(reader.gaps), frozenset(reader.open_gaps)
        at_end = reader.position[:2] == state.last_id
        done = Round(state.epoch, state.meta, state.beat, reader.position, reader.holed_nonce, gaps, open_gaps, at_end)
        for listener in self._listeners:
            listener.round(done)

    def _reread(self, reason: str) -> None:
        """The log contradicts what was read: keep everything, and read it again from its first entry."""
        if self._reader is not None and reason == "next_epoch":
            self._reader.known = self._reader.known_after()
        self._give_up_reader()
        self._tolerant = reason in ("hole", "fork")
        self.counters["rereads"] += 1
        self.counters[f"reread_{reason}"] += 1
        _log.warning("mirror reads the log again: %s", reason)
        self._publish(problem=f"log_{reason}")

    def _pause(self, fruitless: int) -> None:
        """Before reading again: a log that contradicts itself must not be read in a tight loop."""
        if fruitless >= 2:
            longest_s = min(RECONNECT_DELAY_MIN_S * 2**fruitless, RECONNECT_DELAY_MAX_S)
            self._closing.wait(random.uniform(longest_s / 2, longest_s))

    # -- publishing -------------------------------------------------------------------------------------------------

    def _drop_expired(self, freshness: Freshness) -> None:
        """Forget expired entries now and then, by both clocks, on the word of a young confirmed beat alone."""
        now, mono = time.time(), time.monotonic()
        heard = freshness.confirmed
        if mono < self._next_drop_mono or heard is None:
            return
        if not freshness.staleness(now=now, mono=mono, max_staleness_s=DROP_BEAT_AGE_MAX_S).fresh:
            return
        elapsed_s = mono - heard.arrived_mono
        with self._mirror_lock:
            if self._mirror.drop_expired(now, heard.at_s + elapsed_s, self._drop_grace_s, DROP_BUCKETS):
                self._publish(snapshot=self._mirror.snapshot)
            self._next_drop_mono = mono if self._mirror.unswept else mono + DROP_EVERY_S

    def _update(self, *, connection: str) -> None:
        if self._view.connection != connection:
            self._publish(connection=connection)

    def _publish(self, **changes: Any) -> None:
        with self._advanced:
            self._view = replace(self._view, **changes)
            self._advanced.notify_all()
        for on_change in self._on_change:
            on_change(self._view)


def _ends(accepted: list[tuple[Position, Entry]]) -> Iterator[Position]:
    """The last position of each epoch: a beat of one that ends within the batch is reached on the way."""
    for (position, _), (following, _) in pairwise(accepted):
        if position.nonce != following.nonce:
            yield position
    yield accepted[-1][0]
