"""What a recording verifier is told and what it tells: JSON lines, one struct each.

Commands, on its stdin; it ends by itself when that closes, so it never outlives its harness:

    {"op": "watch", "name": …, "token": …, "min": …}       verify this token again and again; `min` is a Trust-Position
    {"op": "unwatch", "name": …}                           not any more
    {"op": "pace", "rate": 500, "rounds_hz": 25}           verifications a second in all, and rounds a second
    {"op": "policy", "max_staleness_s": 2.0}               bound the revocations' age at each verification; null: do not
    {"op": "report", "id": 7}                              tell everything up to now, then {"type": "reported", "id": 7}
    {"op": "stop"}                                         tell everything, then {"type": "stopped"}, and end

Events, on its stdout: `started`, `run`, `sample`, `reported`, `stopped`.

Times are CLOCK_MONOTONIC (`_mono`, seconds: one clock for all processes of a machine, on Linux and macOS) and Unix
seconds (`_wall`). **They never accuse wrongly**: an acceptance bears the time at which its verification began, any
other verdict the time at which it had ended. No acceptance looks later than it was, and no refusal earlier.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

__all__ = [
    "Command",
    "Event",
    "Pace",
    "Policy",
    "Report",
    "Reported",
    "Run",
    "Sample",
    "Started",
    "Stop",
    "Stopped",
    "Unwatch",
    "Verdict",
    "Watch",
]

RATE_MAX = 10_000.0
"""Verifications a second. One takes some 2 µs when the token is cached, 60 µs when it is not: more fills a core."""

ROUNDS_HZ_MAX = 500.0
"""Rounds a second. Each looks at the verifier's status twice, which takes some 20 µs."""

Verdict = Literal["accepted", "revoked", "invalid", "undecidable"]
"""What `verify` answered: claims, `RevokedToken`, another `InvalidToken`, `Undecidable`."""


class Watch(msgspec.Struct, frozen=True, tag_field="op", tag="watch", forbid_unknown_fields=True):
    """Add a token under a name, which is its own for good: runs of two tokens must not be taken for one's."""

    name: str
    token: str
    min: str | None = None

    def __repr__(self) -> str:
        return f"Watch({self.name})"


class Unwatch(msgspec.Struct, frozen=True, tag_field="op", tag="unwatch", forbid_unknown_fields=True):
    name: str


class Pace(msgspec.Struct, frozen=True, tag_field="op", tag="pace", forbid_unknown_fields=True):
    """`rate` bounds the verifications a second in all; no token is verified twice in one round."""

    rate: Annotated[float, msgspec.Meta(gt=0, le=RATE_MAX)] = 500.0
    rounds_hz: Annotated[float, msgspec.Meta(gt=0, le=ROUNDS_HZ_MAX)] = 25.0


class Policy(msgspec.Struct, frozen=True, tag_field="op", tag="policy", forbid_unknown_fields=True):
    """As `verify(token, max_staleness_s=…)`: from here on a verifier that is staler answers `Undecidable`."""

    max_staleness_s: Annotated[float, msgspec.Meta(ge=0)] | None


class Report(msgspec.Struct, frozen=True, tag_field="op", tag="report", forbid_unknown_fields=True):
    id: int


class Stop(msgspec.Struct, frozen=True, tag_field="op", tag="stop", forbid_unknown_fields=True):
    pass


Command = Watch | Unwatch | Pace | Policy | Report | Stop


class Started(msgspec.Struct, frozen=True, tag_field="type", tag="started"):
    """The first event: who it is, and the settings that checkers need."""

    pid: int
    region: str | None
    on_stale: str
    mono: float
    wall: float


class Run(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="run"):
    """Verifications of one token, one after the other, that all had the same outcome.

    Told when it begins, about once a second while it lasts, and when it has ended: a later one with the same `name` and
    `number` replaces the earlier. A run ends when the outcome changes, when the policy does, or with `unwatch`.

    `ready_count` of the `count` verifications were in rounds that began with keys held and the log read; `fresh_count`
    in rounds in which the verifier called itself fresh both before and after. `last_fresh_mono` is when the last such
    round began: at that moment it called itself fresh, and what it held then gave this verdict.
    """

    name: str
    number: int
    verdict: Verdict
    code: str | None
    reason: str | None
    entry_id: str | None
    """Of the revocation that hit, where the verdict is `revoked`."""
    may_deny: bool
    """Whether staleness could make a verification `Undecidable`: `on_stale="deny"`, or a bound by `policy`."""
    has_min: bool
    first_mono: float
    last_mono: float
    first_wall: float
    last_wall: float
    count: int
    ready_count: int = 0
    fresh_count: int = 0
    last_ready_mono: float | None = None
    last_fresh_mono: float | None = None


class Sample(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="sample"):
    """What the verifier said of itself at the beginning of a round: at most ten a second, and each change at once."""

    mono: float
    wall: float
    ready: bool
    fresh: bool
    reason: str | None
    staleness_s: float | None
    confirmed: bool
    position: str | None
    epoch: int | None
    nonce: str | None
    entries: int
    connection: str


class Reported(msgspec.Struct, frozen=True, tag_field="type", tag="reported"):
    """The answer to `report`: all events up to `mono` have been told."""

    id: int
    mono: float
    verifications: int


class Stopped(msgspec.Struct, frozen=True, tag_field="type", tag="stopped"):
    """The last event. `cpu_s` is the processor time of the whole process."""

    mono: float
    verifications: int
    cpu_s: float


Event = Started | Run | Sample | Reported | Stopped
