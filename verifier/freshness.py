"""How stale a mirror is, and whether it may call itself fresh. Pure.

Theory: every write to the log happens before some beat, and a beat is *applied* here once its position is. So a mirror
that applied a beat of time T holds everything appended before T. A beat counts for freshness only once a later beat
says that a majority of regions confirmed it: without that, a zombie primary's side would look fresh for ever.

    staleness = max(monotonic time since the newest applied confirmed beat arrived, wall clock now - its server time)

Nothing is subtracted. The monotonic part survives a wrong wall clock, the wall part an old beat that arrives late. A
beat more than ``max_skew_s`` in the future is not counted, by its own time or by that of the one it confirms. In a
closed epoch none is confirmed, and a newer beat counts only once it is applied: until then the last confirmed one that
was applied, of whatever epoch, goes on ageing. While there was never one, the age of the newest applied beat is
reported instead, marked unconfirmed, and the mirror is not fresh.

A replica may be led to a primary of another system, whose beats are confirmed too, by keepers that know nothing of what
is acknowledged here. So once a beat was confirmed, beats count only in the same log (its incarnation) or a successor,
which names the epoch of that beat: a log that is made anew after all was lost does so before it opens, because keepers
name every epoch that they have on disk. A mirror that began with the wrong log cannot tell; led to the right one it
says ``another_log`` until it is started anew.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from .log import FORMAT, Beat, Epoch, Meta, Position

__all__ = ["Freshness", "Staleness"]


class Heard(NamedTuple):
    """A beat as it was received: its identity, the primary's time, and when it arrived here (monotonic seconds)."""

    nonce: str
    n: int
    at_s: float
    position: Position
    arrived_mono: float


class Staleness(NamedTuple):
    """``seconds`` since the mirror was known to be complete (None: never), and whether a majority vouched for that.

    ``reason`` is None when fresh, else one of ``never_synced``, ``log_format_newer``, ``max_token_lifetime`` (this
    verifier accepts tokens that live longer than the log keeps revocations), ``clock_skew``, ``hole``,
    ``epoch_closed``, ``unconfirmed``, ``another_log``, ``stale``.
    """

    seconds: float | None
    confirmed: bool
    reason: str | None

    @property
    def fresh(self) -> bool:
        """True if a majority vouched for a state that is no older than the bound."""
        return self.reason is None


@dataclass(frozen=True, slots=True)
class Freshness:
    """An immutable record, replaced as rounds of reading come in; :meth:`staleness` is computed when asked.

    ``incarnation`` is that of the log in which a beat was confirmed last.
    """

    max_skew_s: float
    max_token_lifetime_s: float = 0.0
    applied: Heard | None = None
    confirmed: Heard | None = None
    pending: Heard | None = None
    pending_confirmed: Heard | None = None
    synced: bool = False
    epoch_open: bool = False
    log_format_newer: bool = False
    forgets_early: bool = False
    clock_skew: bool = False
    holed_nonce: str | None = None
    incarnation: str | None = None
    another_log: bool = False

    def heard(self, beat: Beat, epoch: Epoch, meta: Meta, *, now: float, mono: float) -> Freshness:
        """A round of reading brought this beat, epoch and meta; ``now`` is wall time, ``mono`` monotonic (seconds)."""
        ahead = max(beat.at_ms, beat.confirmed_at_ms or 0) / 1000 - now > self.max_skew_s
        another = self._is_another(epoch, meta)
        state = replace(
            self,
            epoch_open=epoch.open,
            log_format_newer=meta.min_reader_format > FORMAT,
            forgets_early=meta.max_token_lifetime_s < self.max_token_lifetime_s,
            clock_skew=ahead,
            another_log=another,
        )
        if ahead or another or beat.nonce != epoch.nonce:
            return state
        seen = Heard(beat.nonce, beat.n, beat.at_ms / 1000, beat.position, mono)
        state = replace(state, pending=_newer(seen, self.pending, self.applied))
        if (
            beat.confirmed_n is None
            or beat.confirmed_at_ms is None
            or beat.confirmed_position is None
            or not epoch.open
        ):
            return state
        vouched = Heard(beat.nonce, beat.confirmed_n, beat.confirmed_at_ms / 1000, beat.confirmed_position, mono)
        vouched = _no_earlier(vouched, now + self.max_skew_s, self.pending_confirmed, self.confirmed)
        newest = _newer(vouched, self.pending_confirmed, self.confirmed)
        return replace(state, pending_confirmed=newest, incarnation=meta.incarnation)

    def _is_another(self, epoch: Epoch, meta: Meta) -> bool:
        """Whether this log is not the one, nor a successor of the one, whose beat was confirmed last."""
        if self.confirmed is None or meta.incarnation == self.incarnation:
            return False
        return all(link.nonce != self.confirmed.nonce for link in (*epoch.chain, *epoch.known))

    def reached(self, position: Position) -> Freshness:
        """Everything up to ``position`` is applied: beats that were waiting for it count from now on."""
        state = self
        if self.pending is not None and _covers(position, self.pending, self.holed_nonce):
            state = replace(state, applied=self.pending, pending=None)
        if self.pending_confirmed is not None and _covers(position, self.pending_confirmed, self.holed_nonce):
            state = replace(state, confirmed=self.pending_confirmed, pending_confirmed=None)
        return state

    def staleness(self, *, now: float, mono: float, max_staleness_s: float) -> Staleness:
        """How stale at wall time ``now`` and monotonic time ``mono``, and fresh or not for the bound (seconds)."""
        counted = self.confirmed or self.applied
        seconds = None if counted is None else max(mono - counted.arrived_mono, now - counted.at_s, 0.0)
        return Staleness(seconds, self.confirmed is not None, self._reason(seconds, max_staleness_s))

    def _reason(self, seconds: float | None, max_staleness_s: float) -> str | None:
        stale = seconds is None or not seconds <= max_staleness_s
        checks = (
            (not self.synced, "never_synced"),
            (self.log_format_newer, "log_format_newer"),
            (self.forgets_early, "max_token_lifetime"),
            (self.confirmed is None and self.clock_skew, "clock_skew"),
            (self.confirmed is None and self.holed_nonce is not None, "hole"),
            (self.confirmed is None and not self.epoch_open, "epoch_closed"),
            (self.confirmed is None, "unconfirmed"),
            (stale and self.another_log, "another_log"),
            (stale and self.clock_skew, "clock_skew"),
            (stale and self.holed_nonce is not None, "hole"),
            (stale, "stale"),
        )
        return next((reason for wrong, reason in checks if wrong), None)

    def deadlines(self, max_staleness_s: float) -> tuple[float, float]:
        """(wall, monotonic) seconds at which a mirror that is fresh now stops being so; zeros if it is not fresh."""
        if self.confirmed is None or self._reason(0.0, max_staleness_s) is not None:
            return (0.0, 0.0)
        return (self.confirmed.at_s + max_staleness_s, self.confirmed.arrived_mono + max_staleness_s)


def _newer(seen: Heard, *held: Heard | None) -> Heard | None:
    """``seen`` unless it or a later one of its nonce is held: a beat arrives once, however often it is read."""
    for other in held:
        if other is not None and other.nonce == seen.nonce and other.n >= seen.n:
            return held[0]
    return seen


def _no_earlier(seen: Heard, latest_s: float, *held: Heard | None) -> Heard:
    """With the time of an earlier confirmed beat, if the primary's clock was set back since: who holds all that is
    confirmed by this one holds what that one vouched for, and an old time would say that nobody vouched for hours.
    A time past ``latest_s`` (Unix seconds) is none to keep: then it was set right."""
    before = [h.at_s for h in held if h is not None and _follows(seen, h) and h.at_s <= latest_s]
    return seen._replace(at_s=max(seen.at_s, *before)) if before else seen


def _follows(seen: Heard, other: Heard) -> bool:
    same, later = seen.nonce == other.nonce, seen.position.epoch > other.position.epoch
    return (same and seen.n > other.n) or (not same and later)


def _covers(position: Position, beat: Heard, holed_nonce: str | None) -> bool:
    same = position.nonce == beat.nonce and position.nonce != holed_nonce
    return same and position[:2] >= beat.position[:2]
