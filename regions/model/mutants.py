"""The rules, left out one at a time. A rule that the model cannot show to be needed would be a rule too many.

Each mutant has a kept seed (``KEPT_SEEDS``), at which it breaks the promise that it names, in the way that it names.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from regions.model import mutations as m
from regions.model.parts import Parts

__all__ = ["HEALTHY", "KEPT_SEEDS", "MUTANTS", "Mutant", "by_name"]

LOST = "acknowledged and lost"
FOOLED = "fresh and fooled"
STUCK = "no progress"
OLD = "old voters"


@dataclass(frozen=True, slots=True)
class Mutant:
    """A system with one rule less; the defaults are the system as it is. `breaks` is the promise that falls first."""

    name: str
    rule: str
    breaks: str = LOST
    parts: Parts = field(default_factory=Parts)


HEALTHY = Mutant("healthy", "all of them")

MUTANTS = (
    Mutant("zombie-stays-fresh", "a beat counts once a majority confirmed it", FOOLED, Parts(verifier=m.CountsAnyBeat)),
    Mutant(
        "one-number-two-histories",
        "an epoch is a number and a nonce",
        FOOLED,
        Parts(verifier=m.NumberIsIdentity, server=m.SameNumbers),
    ),
    Mutant("laggard-promoted", "keepers add again what a log lacks", LOST, Parts(keeper=m.AddsNothing)),
    Mutant("restart-from-old-state", "another replication id needs another epoch", LOST, Parts(server=m.TrustsItsDisk)),
    Mutant("acknowledged-over-epochs", "evidence counts within one nonce", LOST, Parts(protocol=m.CountsOverEpochs)),
    Mutant("opened-without-merge", "an epoch opens when majorities have merged", LOST, Parts(protocol=m.OpensAtOnce)),
    Mutant("minority-bump-stalls", "a keeper bumps above its promise", STUCK, Parts(keeper=m.WaitsForOthers)),
    Mutant(
        "acknowledged-while-closed",
        "nothing is acknowledged in a closed epoch",
        LOST,
        Parts(protocol=m.AcknowledgesClosed),
    ),
    Mutant(
        "voters-of-unopened-epoch",
        "old voters are those since an epoch that opened",
        LOST,
        Parts(protocol=m.AsksThePredecessor),
    ),
    Mutant("laggard-brings-old-voters", "keepers hold the chain of epochs", LOST, Parts(keeper=m.NamesNoEpochs)),
    Mutant("restored-under-old-id", "a restored keeper is a new one", LOST, Parts(protocol=m.NeverACopy)),
    Mutant("held-without-inherited", "held means from the first entry", LOST, Parts(keeper=m.SkipsInherited)),
    Mutant("one-entry-an-id", "a union keeps two entries under one id", LOST, Parts(disk=m.OneEntryAnId)),
    Mutant(
        "closed-beats-confirmed",
        "no beat of a closed epoch counts",
        FOOLED,
        Parts(protocol=m.CountsClosed, keeper=m.ConfirmsClosed, verifier=m.CountsClosedBeats),
    ),
    Mutant("promise-broken", "a keeper reports nothing older than its promise", LOST, Parts(keeper=m.BreaksPromises)),
    Mutant(
        "maybe-opened-unasked", "an epoch not known to have opened may have", LOST, Parts(protocol=m.AsksOnlyTheOpened)
    ),
    Mutant("every-epoch-asked", "what opened sets older voters free", STUCK, Parts(protocol=m.AsksEveryEpoch)),
    Mutant("superseded-asked", "older voters than opened ones never open", STUCK, Parts(protocol=m.AsksTheSuperseded)),
    Mutant("impossible-asked", "too few keepers never opened anything", STUCK, Parts(protocol=m.AsksTheImpossible)),
    Mutant(
        "forgotten-awaited",
        "nobody waits for a keeper given up",
        STUCK,
        Parts(protocol=m.WaitsForTheForgotten),
    ),
    Mutant(
        "forgotten-shrink", "those that are left are asked to the last one", LOST, Parts(protocol=m.AsksMostOfTheRest)
    ),
    Mutant("old-voters-stay", "newer voters are brought back", OLD, Parts(keeper=m.TakesOldVoters)),
    Mutant("epochs-named-first", "epochs are named with the last entries", LOST, Parts(keeper=m.NamesEpochsFirst)),
    Mutant("learnt-too-early", "only a log read to its end teaches what opened", LOST, Parts(tail=m.LearnsAtOnce)),
    Mutant(
        "another-log-merged",
        "what was read must be the epoch's history",
        LOST,
        Parts(keeper=m.TakesAnyLog, tail=m.OverlooksForks),
    ),
    Mutant("reported-unmerged", "a keeper reports only what it has merged into", LOST, Parts(keeper=m.ReportsUnmerged)),
    Mutant("hole-unanswered", "a hole is answered with an epoch", STUCK, Parts(keeper=m.IgnoresHoles)),
    Mutant("hole-unnamed", "the answer names the hole", STUCK, Parts(keeper=m.NamesNoHoles)),
    Mutant("hole-overlooked", "a verifier accepts only the successor", FOOLED, Parts(verifier=m.OverlooksHoles)),
    Mutant("intents-left", "an intent that nobody appends is the keeper's", STUCK, Parts(keeper=m.LeavesIntents)),
)
"""Each must be found by its kept seed."""

KEPT_SEEDS = {
    "zombie-stays-fresh": 9,
    "one-number-two-histories": 25,
    "laggard-promoted": 8,
    "restart-from-old-state": 400,
    "acknowledged-over-epochs": 41,
    "opened-without-merge": 7,
    "minority-bump-stalls": 56,
    "acknowledged-while-closed": 41,
    "voters-of-unopened-epoch": 41,
    "laggard-brings-old-voters": 205,
    "restored-under-old-id": 134,
    "held-without-inherited": 1,
    "one-entry-an-id": 1,
    "closed-beats-confirmed": 41,
    "promise-broken": 5,
    "maybe-opened-unasked": 210,
    "every-epoch-asked": 37,
    "superseded-asked": 32160,
    "impossible-asked": 22,
    "forgotten-awaited": 22,
    "forgotten-shrink": 4366,
    "old-voters-stay": 2,
    "epochs-named-first": 216,
    "learnt-too-early": 2786,
    "another-log-merged": 48,
    "reported-unmerged": 5,
    "hole-unanswered": 16,
    "hole-unnamed": 16,
    "hole-overlooked": 1678,
    "intents-left": 1,
}
"""Seeds at which the mutant of that name breaks its promise. They belong to the schedules as they are drawn now."""


def by_name(name: str) -> Mutant | None:
    """The mutant of that name, or the healthy system."""
    return next((mutant for mutant in (HEALTHY, *MUTANTS) if mutant.name == name), None)
