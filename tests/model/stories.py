"""What must be seen to happen at a kept seed: each mutant has a story, and breaks its promise by that one.

A story is a predicate over the replayed trace; ``regions.model.world`` writes the lines that are read here.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

__all__ = ["STORIES", "Trace"]

EPOCH = r"-?\d+\.[0-9a-f]{4}"


@dataclass(slots=True)
class Trace:
    """The lines without their times, and what broke in the last one."""

    lines: list[str]
    region: str = ""
    entry: str = ""
    acked_at: int = 0
    acked_in: str = ""
    opened: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, lines: tuple[str, ...]) -> Trace:
        trace = cls([line[11:] for line in lines])
        broken = re.search(r": (\w) (?:opened without|is fresh without|lacks \[')'? ?(e\d+)?", trace.lines[-1])
        if broken is not None:
            trace.region, trace.entry = broken[1], broken[2] or ""
        for place, line in enumerate(trace.lines):
            said = re.match(rf"\w acknowledges {trace.entry} in ({EPOCH})", line)
            if said is not None:
                trace.acked_at, trace.acked_in = place, said[1]
            opens = re.match(rf"\w opens ({EPOCH}) on", line)
            if opens is not None:
                trace.opened.setdefault(opens[1], place)
        return trace

    def after(self, pattern: str, start: int = 0) -> int | None:
        """The place of the first line from there on that matches."""
        found = (place for place in range(start, len(self.lines)) if re.search(pattern, self.lines[place]))
        return next(found, None)

    def begun(self) -> list[str]:
        """Epochs, as they began."""
        made = (re.search(rf"(?:begins|:) ({EPOCH}) (?:after|above|for|on)", line) for line in self.lines)
        return [found[1] for found in made if found is not None]

    def chosen(self) -> dict[str, tuple[int, str]]:
        """Epochs that an operator began: where in the trace, and who has a seat."""
        said = [(n, re.match(rf"an operator gives seats to (.*): ({EPOCH}) on", t)) for n, t in enumerate(self.lines)]
        return {found[2]: (place, found[1]) for place, found in said if found is not None}

    def state(self) -> str:
        """Where the region whose verifier or server broke the promise stands at the end."""
        return next((line for line in reversed(self.lines) if line.startswith(f"  {self.region}: ")), "")


def zombie_stays_fresh(trace: Trace) -> bool:
    """Acknowledged in one epoch; fresh in another one."""
    return f"in {trace.acked_in}," not in trace.state() and "in no epoch" not in trace.state()


def one_number_two_histories(trace: Trace) -> bool:
    begun = {name: name.split(".")[0] for name in trace.begun()}
    return len(set(begun.values())) < len(begun)


def laggard_promoted(trace: Trace) -> bool:
    return trace.after(rf"^{trace.region} is (promoted|elected) with", trace.acked_at) is not None


def restart_from_old_state(trace: Trace) -> bool:
    return trace.after(rf"^{trace.region}'s server restarts, [1-9]\d* writes behind", trace.acked_at) is not None


def acknowledged_over_epochs(trace: Trace) -> bool:
    """The epoch of the acknowledgement is not the one in which the entry was appended."""
    appended = trace.after(rf"^\w appends {trace.entry} on \w in (?!{re.escape(trace.acked_in)})")
    begins = trace.after(rf"begins {re.escape(trace.acked_in)} ") or trace.after(rf": {re.escape(trace.acked_in)} on")
    return begins is not None and begins < trace.acked_at and (appended is not None or begins > 0)


def opened_without_merge(trace: Trace) -> bool:
    opens = [line for line in trace.lines if re.match(rf"\w opens {EPOCH} on {trace.region}", line)]
    return bool(opens) and len(opens[-1].partition("merged:")[2].split()) < 2


def minority_bump_stalls(trace: Trace) -> bool:
    """At the end some keeper has promised more than the log shows."""
    pattern = r"^  \w: .* in (-?\d+)\.[0-9a-f]{4}, closed; .* promise (-?\d+)\."
    stands = [re.match(pattern, line) for line in trace.lines[-8:]]
    return any(found is not None and int(found[2]) > int(found[1]) for found in stands)


def acknowledged_while_closed(trace: Trace) -> bool:
    return trace.acked_in != "" and trace.opened.get(trace.acked_in, len(trace.lines)) > trace.acked_at


def voters_of_unopened_epoch(trace: Trace) -> bool:
    """Voters were chosen for an epoch that never opened, and a later one opened without those who voted before."""
    last = max(trace.opened.values(), default=0)
    return any(name not in trace.opened and place < last for name, (place, _) in trace.chosen().items())


def laggard_brings_old_voters(trace: Trace) -> bool:
    """Five seats, and open; then somebody leads who has never heard of it."""
    grown = [name for name, (_, seats) in trace.chosen().items() if seats == "a, b, c, d, e" and name in trace.opened]
    if not grown:
        return False
    leads = trace.after(r" is (elected|promoted) with", trace.opened[grown[0]])
    return leads is not None and trace.opened[grown[0]] < trace.acked_at


def restored_under_old_id(trace: Trace) -> bool:
    put_back = trace.after("is put back from a copy, in silence", trace.acked_at)
    return put_back is not None


def held_without_inherited(trace: Trace) -> bool:
    """An entry of an older epoch is acknowledged in a newer one."""
    appended = trace.after(rf"^\w appends {trace.entry} on \w in (?!{re.escape(trace.acked_in)})")
    return appended is not None and appended < trace.acked_at


def one_entry_an_id(trace: Trace) -> bool:
    mine = trace.after(rf"^\w stores {trace.entry} under the id e") is not None
    return mine or trace.after(rf"^\w stores e\d+ under the id {trace.entry}$") is not None


def hole(trace: Trace) -> bool:
    return trace.after("^an operator deletes") is not None


def forgotten(trace: Trace) -> bool:
    return trace.after("^an operator forgets keeper-") is not None


def put_late(trace: Trace) -> bool:
    """Voters were changed, and what was acknowledged came over by few."""
    return trace.after(r"^keeper \w adds .* so far", trace.acked_at) is not None or bool(trace.chosen())


STORIES: dict[str, Callable[[Trace], bool]] = {
    "zombie-stays-fresh": zombie_stays_fresh,
    "one-number-two-histories": one_number_two_histories,
    "laggard-promoted": laggard_promoted,
    "restart-from-old-state": restart_from_old_state,
    "acknowledged-over-epochs": acknowledged_over_epochs,
    "opened-without-merge": opened_without_merge,
    "minority-bump-stalls": minority_bump_stalls,
    "acknowledged-while-closed": acknowledged_while_closed,
    "voters-of-unopened-epoch": voters_of_unopened_epoch,
    "laggard-brings-old-voters": laggard_brings_old_voters,
    "restored-under-old-id": restored_under_old_id,
    "held-without-inherited": held_without_inherited,
    "one-entry-an-id": one_entry_an_id,
    "hole-unanswered": hole,
    "hole-unnamed": hole,
    "hole-overlooked": hole,
    "forgotten-awaited": forgotten,
    "forgotten-shrink": forgotten,
    "epochs-named-first": put_late,
    "learnt-too-early": put_late,
}
"""By mutant; those that are not named here have no story beyond the promise that they break."""
