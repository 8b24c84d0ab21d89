"""Folds verifications into runs. Pure: every time is an argument.

One more verification with the same outcome costs a few additions; an event is made only when a run begins, ends, or is
asked for. What a round was (ready, fresh) is known only when it is over, so it is added to its runs then.
"""

from __future__ import annotations

from typing import NamedTuple

from regions.recorder.events import Run, Verdict

__all__ = ["ACCEPTED", "Outcome", "Tape", "Watched"]


class Outcome(NamedTuple):
    """What one verification answered. Two that are equal belong to one run."""

    verdict: Verdict
    code: str | None = None
    reason: str | None = None
    entry_id: str | None = None


ACCEPTED = Outcome("accepted")


class _Open:
    """A run that goes on; `told` is the count at its last event."""

    __slots__ = (
        "count",
        "first_mono",
        "first_wall",
        "fresh_count",
        "last_fresh_mono",
        "last_mono",
        "last_ready_mono",
        "last_wall",
        "may_deny",
        "number",
        "outcome",
        "ready_count",
        "told",
    )

    def __init__(self, number: int, outcome: Outcome, mono: float, wall: float, may_deny: bool) -> None:
        self.number = number
        self.outcome = outcome
        self.may_deny = may_deny
        self.first_mono = self.last_mono = mono
        self.first_wall = self.last_wall = wall
        self.count = self.ready_count = self.fresh_count = self.told = 0
        self.last_ready_mono: float | None = None
        self.last_fresh_mono: float | None = None


class Watched:
    """A token under its name, and the run it is in."""

    __slots__ = ("min", "name", "next_number", "run", "token")

    def __init__(self, name: str, token: str, min_position: str | None, next_number: int) -> None:
        self.name = name
        self.token = token
        self.min = min_position
        self.next_number = next_number
        self.run: _Open | None = None


class Tape:
    """What is watched and what came of it. `take()` gives the events since the last time."""

    def __init__(self, *, may_deny: bool) -> None:
        self.verifications = 0
        self._may_deny = may_deny
        self._watched: dict[str, Watched] = {}
        self._numbers: dict[str, int] = {}
        self._events: list[Run] = []
        self._round: list[_Open] = []
        self._begun: list[Watched] = []

    @property
    def watched(self) -> list[Watched]:
        """In the order in which they were added."""
        return list(self._watched.values())

    def watch(self, name: str, token: str, min_position: str | None = None) -> None:
        """Add a token; after `unwatch` its runs are numbered on."""
        self.unwatch(name)
        self._watched[name] = Watched(name, token, min_position, self._numbers.get(name, 0))

    def unwatch(self, name: str) -> None:
        """Forget a token; nothing happens if there is none of this name."""
        watched = self._watched.pop(name, None)
        if watched is not None:
            self._end(watched)
            self._numbers[name] = watched.next_number

    def set_policy(self, *, may_deny: bool) -> None:
        """Every run ends: what follows is judged by another rule."""
        for watched in self._watched.values():
            self._end(watched)
        self._may_deny = may_deny

    def add(self, watched: Watched, outcome: Outcome, *, began_mono: float, ended_mono: float, wall: float) -> None:
        """One verification."""
        mono = began_mono if outcome is ACCEPTED else ended_mono
        run = watched.run
        if run is None or run.outcome != outcome:
            self._end(watched)
            run = watched.run = _Open(watched.next_number, outcome, mono, wall, self._may_deny)
            watched.next_number += 1
            self._begun.append(watched)
        run.count += 1
        run.last_mono, run.last_wall = mono, wall
        self.verifications += 1
        self._round.append(run)

    def round_over(self, began_mono: float, *, ready: bool, fresh: bool) -> None:
        """What held for the verifications since the last call; new runs are told now."""
        for run in self._round if ready else ():
            run.ready_count += 1
            run.last_ready_mono = began_mono
            if fresh:
                run.fresh_count += 1
                run.last_fresh_mono = began_mono
        self._round.clear()
        for watched in self._begun:
            if watched.run is not None:
                self._tell(watched, watched.run)
        self._begun.clear()

    def tell_open(self) -> None:
        """Make an event of every run that has grown since its last one."""
        for watched in self._watched.values():
            if watched.run is not None and watched.run.count != watched.run.told:
                self._tell(watched, watched.run)

    def take(self) -> list[Run]:
        """The events since the last call. To be called between rounds."""
        events, self._events = self._events, []
        return events

    def _end(self, watched: Watched) -> None:
        if watched.run is not None:
            self._tell(watched, watched.run)
            watched.run = None

    def _tell(self, watched: Watched, run: _Open) -> None:
        run.told = run.count
        outcome = run.outcome
        self._events.append(
            Run(
                name=watched.name,
                number=run.number,
                verdict=outcome.verdict,
                code=outcome.code,
                reason=outcome.reason,
                entry_id=outcome.entry_id,
                may_deny=run.may_deny,
                has_min=watched.min is not None,
                first_mono=run.first_mono,
                last_mono=run.last_mono,
                first_wall=run.first_wall,
                last_wall=run.last_wall,
                count=run.count,
                ready_count=run.ready_count,
                fresh_count=run.fresh_count,
                last_ready_mono=run.last_ready_mono,
                last_fresh_mono=run.last_fresh_mono,
            )
        )
