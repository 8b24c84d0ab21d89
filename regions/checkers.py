"""What must hold of a scenario on real servers (P2, P3, P4), each as an object of its own that can fail. Pure.

    witnesses = [witness(recorder) for recorder in recorders]
    violations = [v for checker in (AcknowledgedNotLost(…), …) for v in checker.check()]

The evidence is what recording verifiers saw (`regions.recorder`) against what the harness did (`regions.ledger`). Both
keep times in a way that cannot accuse wrongly; what was not looked at is a violation too (`not looked at`), so a
scenario in which nothing was seen does not pass. `counted` says which receipts count as an acknowledgement: only
`replicated` ones are promised to outlive a fault; where nothing fails, `pending` ones must be enforced as well.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Literal, Protocol

from regions.ledger import Durability, Ledger, Request, Revocation
from regions.recorder.events import Run

__all__ = [
    "AcknowledgedNotLost",
    "Checker",
    "FreshNotFooled",
    "LeakWindow",
    "NeverUnrevoked",
    "NoValidRequestFailed",
    "Violation",
    "Witness",
    "leak_windows",
    "tally",
]

Kind = Literal["acknowledged and lost", "un-revoked", "fresh and fooled", "valid and refused", "not looked at"]

REPLICATED: frozenset[Durability] = frozenset({"replicated"})

DENY_CODES = frozenset({"revocations_stale", "never_synced"})
"""The names under which policy `deny` may leave a valid token undecided."""


@dataclass(frozen=True, slots=True)
class Violation:
    """A promise is broken: where, how, and the times (monotonic seconds) and runs that show it."""

    promise: str
    kind: Kind
    message: str
    region: str
    times: Mapping[str, float] = field(default_factory=dict)
    evidence: tuple[Run | Request | Revocation, ...] = ()

    def __str__(self) -> str:
        times = "".join(f", {name} {value:.3f}" for name, value in self.times.items())
        return f"{self.promise} {self.kind}: {self.region}: {self.message}{times}"


@dataclass(frozen=True, slots=True)
class Witness:
    """One recording verifier and all that it saw. `at_end`: it is running and connected when the scenario ends."""

    id: str
    region: str
    started_mono: float
    runs: Mapping[str, Sequence[Run]]
    at_end: bool = True


class Checker(Protocol):
    """Anything with a verdict."""

    def check(self) -> list[Violation]:
        """Every way in which the promise is broken."""


@dataclass(frozen=True, slots=True)
class AcknowledgedNotLost:
    """P2: what was acknowledged is enforced at the end at every connected verifier, and stands in the log.

    `log_ids` are the ids in the log of the primary at the end; None: not asked.
    """

    witnesses: Sequence[Witness]
    ledger: Ledger
    log_ids: Collection[str] | None = None
    counted: Collection[Durability] = REPLICATED

    def check(self) -> list[Violation]:
        return list(self._violations())

    def _violations(self) -> Iterator[Violation]:
        for revocation, since in self.ledger.counted(self.counted):
            if self.log_ids is not None and revocation.id not in self.log_ids:
                message = f"{revocation.id} is not in the log of the last primary"
                times = {"acknowledged": since}
                yield Violation("P2", "acknowledged and lost", message, "primary", times, (revocation,))
            for witness in self.witnesses:
                if witness.at_end:
                    for name in revocation.tokens:
                        yield from self._not_enforced(witness, name, revocation, since)

    def _not_enforced(self, witness: Witness, name: str, revocation: Revocation, since: float) -> Iterator[Violation]:
        runs = witness.runs.get(name, ())
        settled = self.ledger.settled_mono or 0.0
        if not runs or runs[-1].last_mono < max(settled, since):
            message = f"{witness.id} has not verified {name} since the end"
            yield Violation("P2", "not looked at", message, witness.region, {"acknowledged": since}, tuple(runs[-1:]))
        elif runs[-1].verdict not in ("revoked", "invalid"):
            last = runs[-1]
            message = f"{witness.id} ends with {name} {last.verdict}, which {revocation.id} revoked"
            times = {"acknowledged": since, "accepted last": last.last_mono}
            yield Violation("P2", "acknowledged and lost", message, witness.region, times, (revocation, last))


@dataclass(frozen=True, slots=True)
class NeverUnrevoked:
    """P2: what a verifier has refused as revoked it never accepts again.

    Whatever its receipt said: a verifier only ever adds to what it holds. A verifier that was started later in the same
    region holds nothing of the earlier one's, so it is bound only by acknowledged revocations, and once it is *fresh*
    (`after_restart="synced"`, for scenarios that leave the region's server alone: once it has read the log).
    """

    witnesses: Sequence[Witness]
    ledger: Ledger
    counted: Collection[Durability] = REPLICATED
    after_restart: Literal["fresh", "synced"] = "fresh"

    def check(self) -> list[Violation]:
        found = [v for witness in self.witnesses for name in witness.runs for v in self._itself(witness, name)]
        for revocation, since in self.ledger.counted(self.counted):
            for name in revocation.tokens:
                found += self._restarted(name, revocation, since)
        return found

    def _itself(self, witness: Witness, name: str) -> Iterator[Violation]:
        refused: Run | None = None
        for run in witness.runs[name]:
            if run.verdict == "revoked":
                refused = refused or run
            elif run.verdict == "accepted" and refused is not None:
                yield self._violation(witness, name, refused, run, run.last_mono)

    def _restarted(self, name: str, revocation: Revocation, since: float) -> Iterator[Violation]:
        for earlier in self.witnesses:
            refused = next((run for run in earlier.runs.get(name, ()) if run.verdict == "revoked"), None)
            if refused is None:
                continue
            bound_from = max(refused.first_mono, since)
            for later in self.witnesses:
                if later.region == earlier.region and later.started_mono > earlier.started_mono:
                    for run in later.runs.get(name, ()):
                        at = run.last_fresh_mono if self.after_restart == "fresh" else run.last_ready_mono
                        if run.verdict == "accepted" and at is not None and at > bound_from:
                            yield self._violation(later, name, refused, run, at)

    def _violation(self, witness: Witness, name: str, refused: Run, accepted: Run, at: float) -> Violation:
        message = f"{witness.id} accepted {name}, which {refused.entry_id} had revoked there"
        times = {"refused": refused.first_mono, "accepted last": at}
        return Violation("P2", "un-revoked", message, witness.region, times, (refused, accepted))


@dataclass(frozen=True, slots=True)
class FreshNotFooled:
    """P3: no acceptance by a verifier that calls itself fresh, later than acknowledged + max_staleness_s + max_skew_s.

    Both are the recorders' own settings, in seconds.
    """

    witnesses: Sequence[Witness]
    ledger: Ledger
    max_staleness_s: float = 5.0
    max_skew_s: float = 5.0
    counted: Collection[Durability] = REPLICATED

    def check(self) -> list[Violation]:
        return [
            self._violation(witness, revocation, since, run)
            for revocation, since in self.ledger.counted(self.counted)
            for witness in self.witnesses
            for name in revocation.tokens
            for run in witness.runs.get(name, ())
            if run.verdict == "accepted"
            and run.last_fresh_mono is not None
            and run.last_fresh_mono > since + self.max_staleness_s + self.max_skew_s
        ]

    def _violation(self, witness: Witness, revocation: Revocation, since: float, run: Run) -> Violation:
        late_s = (run.last_fresh_mono or 0.0) - since
        message = f"{witness.id} called itself fresh and accepted {run.name} {late_s:.3f} s after {revocation.id}"
        times = {"acknowledged": since, "accepted fresh": run.last_fresh_mono or 0.0}
        return Violation("P3", "fresh and fooled", message, witness.region, times, (revocation, run))


@dataclass(frozen=True, slots=True)
class NoValidRequestFailed:
    """P4: a token that is neither revoked nor expired is never refused; nor left undecided, once keys and log are read.

    Where staleness may deny (`on_stale="deny"`, `max_staleness_s=`), it may be undecided under that policy's names; and
    where a `min_position` was asked for, until that is reached. A service that does not answer at all is no failure of
    verification; `allow` says that the services of `ledger.requests` verify under policy `allow`.
    """

    witnesses: Sequence[Witness]
    ledger: Ledger
    allow: bool = True

    def check(self) -> list[Violation]:
        revoked_from = self.ledger.revoked_from()
        found = [
            self._violation(f"{witness.id} answered {run.verdict} ({run.code}) for {name}", witness.region, run)
            for witness in self.witnesses
            for name, runs in witness.runs.items()
            for run in runs
            if _failed(run) and self._is_valid(name, run.first_mono, run.first_wall, revoked_from)
        ]
        failing = (401, 503) if self.allow else (401,)
        found += [
            self._violation(f"a service answered HTTP {each.status} for {each.token}", each.region, each)
            for each in self.ledger.requests
            if each.status in failing
            and self._is_valid(each.token, each.answered_mono, each.answered_wall, revoked_from)
        ]
        return found

    def _is_valid(self, name: str, mono: float, wall: float, revoked_from: Mapping[str, float]) -> bool:
        return wall < self.ledger.tokens[name].expires_at and mono < revoked_from.get(name, inf)

    def _violation(self, message: str, region: str, shown: Run | Request) -> Violation:
        at = shown.first_mono if isinstance(shown, Run) else shown.answered_mono
        return Violation("P4", "valid and refused", f"{message}, which is valid", region, {"answered": at}, (shown,))


def _failed(run: Run) -> bool:
    """Whether this is no answer for a valid token."""
    if run.verdict != "undecidable":
        return run.verdict != "accepted"
    excused = (run.may_deny and run.code in DENY_CODES) or (run.has_min and run.code == "position_not_reached")
    return run.ready_count > 0 and not excused


@dataclass(frozen=True, slots=True)
class LeakWindow:
    """How long a revoked token lived in one verifier, in seconds; None where it was not seen, or not known.

    `lag_s` is from the append on the primary to the first refusal (wall clocks); the others from when the revocation
    was sent or acknowledged (monotonic). The end lies between the last acceptance and the first refusal.
    """

    revocation: str
    token: str
    region: str
    last_accept_after_sent_s: float | None
    first_refusal_after_sent_s: float | None
    last_accept_after_acknowledged_s: float | None
    first_refusal_after_acknowledged_s: float | None
    lag_s: float | None


def leak_windows(witnesses: Iterable[Witness], ledger: Ledger) -> list[LeakWindow]:
    """One per revocation, token and verifier that has verified that token."""
    return [
        _leak_window(revocation, name, witness.region, witness.runs[name])
        for revocation in ledger.revocations
        for name in revocation.tokens
        for witness in witnesses
        if name in witness.runs
    ]


def _leak_window(revocation: Revocation, name: str, region: str, runs: Sequence[Run]) -> LeakWindow:
    accepted = max((run.last_mono for run in runs if run.verdict == "accepted"), default=None)
    refusal = next((run for run in runs if run.verdict == "revoked"), None)
    refused = None if refusal is None else refusal.first_mono
    return LeakWindow(
        revocation.id,
        name,
        region,
        _after(accepted, revocation.sent_mono),
        _after(refused, revocation.sent_mono),
        _after(accepted, revocation.acknowledged_mono),
        _after(refused, revocation.acknowledged_mono),
        _after(None if refusal is None else refusal.first_wall, revocation.appended_wall),
    )


def _after(later: float | None, earlier: float | None) -> float | None:
    return None if later is None or earlier is None else later - earlier


def tally(violations: Iterable[Violation]) -> dict[str, int]:
    """How many of each kind, zeros included: `{"acknowledged and lost": 0, …}`."""
    counts = Counter(violation.kind for violation in violations)
    kinds: tuple[Kind, ...] = (
        "acknowledged and lost",
        "un-revoked",
        "fresh and fooled",
        "valid and refused",
        "not looked at",
    )
    return {kind: counts[kind] for kind in kinds}
